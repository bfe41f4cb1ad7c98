"""Wrong configurations: valid ones that are changed at random, and what the library says to them.

A `case` is drawn from a `random.Random`, so that its seed gives it again; hypothesis draws and
shrinks it in the same way.
"""

import contextlib
import json
import pathlib
import re
import signal
import string
import warnings

import keras
import numpy as np
from fuzz_valid import VALID
from keras import layers

import keras_compress as kc
from keras_compress.options import ConfigError

LIMIT = 10  # seconds that one configuration may take


def tiny_model():
    """Return the model that every configuration is for."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    left = layers.ReLU(name="relu")(x)
    left = layers.Conv2D(4, 3, padding="same", activation="relu", name="body")(left)
    left = layers.Conv2D(4, 1, name="left")(left)
    right = layers.Conv2D(4, 1, name="right")(x)
    x = layers.Add(name="add")([left, right])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(4, activation="relu", name="hidden")(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax", name="head")(x), name="tiny")


def nested(depth, many=False):
    """Return lists or objects inside each other."""
    value = 1
    for _ in range(depth):
        value = {"a": value} if many else [value]
    return value


ODD = [
    *(None, True, False, -1, 0, 1, 2, 3, 8, 9, 0.5, 0.999999, 1.0, 1.5, 100, 1e9, -1e-9, 1e308),
    *(10**30, 10**400, -(10**400), 10**5000, float("nan"), float("inf"), -float("inf"), 5e-324),
    *("", " ", "x", "8", "true", "null", "none", "{re}", "{re}(", "{re}[[a]", "{re}.*", "{re}a**"),
    *(
        "{re}(?P<a>x)(?P<a>y)",
        "{re}a{99999999999}",
        "{re}(?i",
        "{re}x(?i)",
        "{re}\\",
        "{re}(?<=a*)",
    ),
    *("{re}" + "(" * 3000 + ")" * 3000, "{re}[a||b]", "\u2603", "\ud800", "\0", "a\nb", "..", "/"),
    *("x" * 100_000, "stem", "body", "head", "2:4", "4:2", "0:0", "999999999999999999999:2", "²:³"),
    *([], [[]], [None], [1, 2], ["stem"], [[4, "stem"]], ["stem", 3], {}, {"a": 1}, {"": {}}),
    *(nested(50), nested(50, True), nested(3000), nested(3000, True)),
]
NAMES = [
    *("self", "cls", "algorithm", "algorithms", "compression", "registry", "name", "to_dict"),
    *("model_config", "model_extra", "model_fields_set", "__class__", "__dict__", "__init__"),
    *("__pydantic_extra__", "", " ", "x", "\u2603", "a.b", "a[0]", "\0", "\ud800", "x" * 1000),
    *("values", "source", "load", "config", "target_devce", "Compression", "written", "adjustable"),
]


class Case:
    """A configuration that was changed at random.

    Attributes:
        tree: the configuration; None where only its text is known.
        text: the bytes of its file; None where it is given as a dictionary.
        touched: keys on the way to what was changed.
        changes: what was done, for a reader.
    """

    def __init__(self, random):
        self.random = random
        self.tree = copied(random.choice(VALID))
        self.text = None
        self.touched = set()
        self.changes = []
        for _ in range(random.choice([1, 1, 1, 2, 3, 5])):
            change = random.choice([random.choice(CHANGES), plausible, add_known])
            self.changes.append(change.__name__)
            change(self)
        if random.randrange(8) == 0:
            self.text = broken(random, self.tree)
            self.tree = None

    def places(self):
        """Return (container, key, keys that lead there) of every value."""
        found = []

        def walk(container, path):
            pairs = container.items() if isinstance(container, dict) else enumerate(container)
            for key, value in pairs:
                found.append((container, key, (*path, key)))
                if isinstance(value, (dict, list)) and len(path) < 20:
                    walk(value, (*path, key))

        walk(self.tree, ())
        return found

    def place(self, fits=lambda container, key: True):
        """Return (container, key) of a value, chosen at random, or None; it counts as touched."""
        fitting = [each for each in self.places() if fits(each[0], each[1])]
        if not fitting:
            return None
        container, key, path = self.random.choice(fitting)
        self.touched |= {part for part in path if isinstance(part, str)}
        if isinstance(container, dict):
            self.touched |= set(container)
        return container, key

    def object(self):
        """Return an object of the configuration, chosen at random."""
        found = self.place(lambda container, key: isinstance(container[key], dict))
        return self.tree if found is None else found[0][found[1]]


def copied(tree, depth=60):
    """Return a copy of lists and dictionaries, whole down to a depth."""
    if isinstance(tree, dict) and depth:
        return {key: copied(value, depth - 1) for key, value in tree.items()}
    if isinstance(tree, list) and depth:
        return [copied(value, depth - 1) for value in tree]
    return tree


CHANGES = []


def change(function):
    CHANGES.append(function)
    return function


@change
def delete(case):
    if place := case.place(lambda container, key: isinstance(container, dict)):
        del place[0][place[1]]


@change
def rename(case):
    if place := case.place(lambda container, key: isinstance(container, dict)):
        container, key = place
        text = str(key)
        spot = case.random.randrange(len(text) + 1)
        new = case.random.choice(
            [
                text[:spot] + case.random.choice(string.ascii_lowercase) + text[spot:],
                text[:spot] + text[spot + 1 :],
                text.upper(),
                case.random.choice(NAMES),
                case.random.choice(WORDS),
            ]
        )
        container[new] = container.pop(key)
        case.touched.add(new)


@change
def replace(case):
    if place := case.place():
        place[0][place[1]] = copied(case.random.choice(ODD))


@change
def replace_leaf(case):
    if place := case.place(lambda container, key: not isinstance(container[key], (dict, list))):
        place[0][place[1]] = copied(case.random.choice(ODD))


@change
def scale(case):
    def fits(container, key):
        value = container[key]
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    if place := case.place(fits):
        value = place[0][place[1]]
        small = abs(value) < 1e300
        halved = value / 2 if small else 0.1
        changed = [-value, value * 1000, value + 1, halved, f"{value:g}" if small else "1", [value]]
        place[0][place[1]] = case.random.choice(changed)


@change
def plausible(case):
    """Write what another configuration has under the same key, or another number in its range."""
    if place := case.place(lambda container, key: key in SAMPLES):
        container, key = place
        value = container[key]
        other = case.random.choice(SAMPLES[key])
        if isinstance(value, float):
            other = case.random.choice([other, case.random.random()])
        elif isinstance(value, bool):
            other = not value
        elif isinstance(value, int):
            other = case.random.choice([other, case.random.randrange(1, 20)])
        elif isinstance(value, str) and CHOICES.get(key):
            other = case.random.choice(CHOICES[key])
        container[key] = copied(other)


@change
def wrap(case):
    if place := case.place():
        value = place[0][place[1]]
        changed = [[value], {"a": value}, [value, value], (value,)]
        place[0][place[1]] = case.random.choice(changed)


@change
def unwrap(case):
    if place := case.place(lambda container, key: isinstance(container[key], (dict, list))):
        value = place[0][place[1]]
        inside = list(value.values()) if isinstance(value, dict) else value
        place[0][place[1]] = case.random.choice([*inside, len(inside)])


@change
def insert(case):
    target = case.object()
    key = case.random.choice([case.random.choice(NAMES), case.random.choice(WORDS)])
    values = [case.random.choice(ODD), *case.random.sample(SAMPLES.get(key, [None]), 1)]
    target[key] = copied(case.random.choice(values))
    case.touched |= {key, *target}


@change
def add_known(case):
    """Write one more key into an object that has it in another configuration."""
    path, key, value = case.random.choice(KNOWN)
    target = case.tree
    for part in path:
        inside = target.get(part) if isinstance(target, dict) else None
        if isinstance(inside, list) and inside:
            inside = case.random.choice(inside)
        if not isinstance(inside, dict):
            break
        target = inside
    target[key] = copied(value)
    case.touched |= {key, *path, *target}


@change
def add_algorithm(case):
    found = case.random.choice(VALID)["compression"]
    more = case.random.choice(found) if isinstance(found, list) else found
    present = case.tree.get("compression", [])
    present = present if isinstance(present, list) else [present]
    case.tree["compression"] = [*present, copied(more)]
    case.touched |= {"compression", "algorithm"}


@change
def swap(case):
    first, second = case.place(), case.place()
    if first and second:
        (one, key), (other, name) = first, second
        # Copies, so that nothing comes to lie inside itself.
        one[key], other[name] = copied(other[name]), copied(one[key])


@change
def scopes(case):
    target = case.object()
    key = case.random.choice(["ignored_scopes", "target_scopes"])
    texts = [each for each in ODD if isinstance(each, str)] + ["{re}conv", "image", "norm"]
    target[key] = case.random.choice([case.random.choice(texts), [case.random.choice(texts)]])
    case.touched |= {key, *target}


@change
def no_text_key(case):
    """A dictionary of Python may have other keys than texts."""
    target = case.object()
    target[case.random.choice([1, None, (1, 2), 2.5])] = case.random.choice(["x", {}, 1])
    case.touched |= {str(key) for key in target}


def broken(random, tree):
    """Return the bytes of a JSON file that was broken, or has comments."""
    try:
        text = json.dumps(tree, indent=random.choice([None, 1]), default=str)
    except (ValueError, TypeError, RecursionError):  # too deep, too long, or a key of another type
        text = '{"compression": {"algorithm": "quantization"}}'
    if len(text) > 20_000:  # the reader is slow
        text = text[: random.randrange(2000)]
    for _ in range(random.choice([0, 1, 1, 2, 5])):
        spot = random.randrange(len(text) + 1)
        odd = random.choice(
            list("{}[]:,\"'/*+-.0eNx\\\n\t") + ["NaN", "Infinity", "\ufeff", "//", "/*"]
        )
        text = random.choice(
            [
                text[:spot],
                text[:spot] + odd + text[spot:],
                text[:spot] + text[spot + 1 :],
                text[:spot] + text[max(spot - 20, 0) :],
                text[:spot] + "/* remark */" + text[spot:],
                text + "// the end",
            ]
        )
    data = text.encode("utf-8", "surrogatepass")
    if random.randrange(8) == 0:
        spot = random.randrange(len(data) + 1)
        data = (
            data[:spot] + random.choice([b"\xff", b"\xc3", b"\x00", b"\xed\xa0\x80"]) + data[spot:]
        )
    if random.randrange(30) == 0:
        data = random.choice(
            [b"", b"[" * 5000, b'{"a":' * 2000, b"\xff\xfe{\x00}\x00", b"1" * 5000]
        )
    return data


def _words_and_samples():
    """Return every key of the format, and (path, key, value) of those that are in `VALID`."""
    known, samples = [], {}

    def walk(tree, path):
        if isinstance(tree, list):
            for item in tree:
                walk(item, path)
        elif isinstance(tree, dict):
            for key, value in tree.items():
                known.append((path, key, value))
                samples.setdefault(key, []).append(value)
                walk(value, (*path, key))

    for tree in VALID:
        walk(tree, ())
    schema = json.loads(
        (pathlib.Path(__file__).parent.parent / "docs/config.schema.json").read_text()
    )
    models = [schema, *schema["$defs"].values()]
    properties = [item for model in models for item in model.get("properties", {}).items()]
    choices = {}
    for key, definition in properties:
        for each in (definition, *definition.get("anyOf", ())):
            choices.setdefault(key, []).extend(each.get("enum", ()))
    return sorted({key for key, _ in properties}), known, samples, choices


WORDS, KNOWN, SAMPLES, CHOICES = _words_and_samples()


class TooSlow(BaseException):
    """A configuration took longer than `LIMIT` seconds."""


@contextlib.contextmanager
def limited(seconds=LIMIT):
    """Raise `TooSlow` after some seconds."""

    def stop(*arguments):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case, model, folder, compress=False):
    """Return (verdict, remark): "accepted", "refused", "unnamed" or "crashed".

    Args:
        case: the `Case`.
        model: a model of `tiny_model`.
        folder: for its file.
        compress: whether the model is also compressed, where the configuration is accepted.
    """
    source = case.tree
    if case.text is not None:
        source = folder / "config.json"
        source.write_bytes(case.text)
    try:
        with warnings.catch_warnings(), limited():
            warnings.simplefilter("error")
            # As in setup.cfg: arrays of TensorFlow variables do not take NumPy 2's `copy` yet.
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            config = kc.Config.load(source)
            check_config(config)
            kc.plan(model, config)
            if compress:
                data = case.random.choice([None, np.ones((4, 8, 8, 3), "float32")])
                kc.compress_model(model, config, data=data, verbose=False)
    except ConfigError as error:
        return judged(error, case)
    except ValueError as error:
        if compress and re.search(r"[Ee]xpected .*Received: ", str(error), re.DOTALL):
            return "refused", str(error)
        return "crashed", f"{type(error).__name__}: {error}"
    except (Exception, TooSlow) as error:
        return "crashed", f"{type(error).__name__}: {error}"
    return "accepted", ""


def check_config(config):
    """Raise where an accepted configuration cannot be written and read again."""
    for status in config.key_report():
        str(status)
    text = json.dumps(config.to_dict())
    again = kc.Config.load(json.loads(text))
    if json.dumps(again.to_dict()) != text:
        raise RuntimeError("the configuration is another one when it is read again")


def judged(error, case):
    """Return what a refusal is worth: it must name the key at fault, and what was received."""
    text = str(error)
    text.encode("utf-8")  # it can be printed
    tree = case.tree if case.text is None else None
    for problem in error.problems:
        quoted = set(re.findall(r"(?<=`)\w+(?=`)|\b\w{1,50}(?==)", problem.message))
        place = re.match(r"[\w.\[\]]+(?=: )", problem.message)  # sparse_structure[1].target_scopes
        quoted |= set(re.findall(r"\w+", place[0] if place else ""))
        said = set(re.findall(r"\w+", problem.message)) & case.touched
        named = quoted & set(WORDS) or said - {"compression", "algorithm"}
        named = named or leads_to_a_key(problem.path, tree, problem.message)
        in_file = re.search(r"config.json: expected|Expected the path.*config.json", text)
        if not named and not (case.text is not None and in_file):
            return "unnamed", text
        if not re.search(r"[Rr]eceived|required|matches no|expected only with", problem.message):
            return "unnamed", text
    return "refused", text


def leads_to_a_key(path, tree, message):
    """Whether a path ends at a key that was written, or is said to be required.

    A place under `compression` is none, unless it holds something else than an algorithm.
    """
    if tree is not None:
        for part in path[:-1]:
            tree = (
                {str(key): item for key, item in tree.items()}[part]
                if isinstance(tree, dict)
                else tree[part]
            )
        missing = isinstance(tree, dict) and path[-1:] and path[-1] not in map(str, tree)
        if missing and "required" not in message:
            return False
    keys = [part for part in path if isinstance(part, str)]
    return keys[-1:] not in ([], ["compression"]) or "expected an object" in message
