"""Trains with two workers, and goes on from what the first one saved, if it has saved.

    python lost_worker.py multi-worker:RANK:PORT:PORT FOLDER [STEP]

The second worker ends without a word before a step, where one is given. The first one saves after
every epoch. Both write what training ended with.
"""

import os
import pathlib
import signal
import sys

import distributed_training as training  # first: it reads the first argument, and finds examples

import distributed  # isort: skip  (the example)
import numpy as np
import tensorflow as tf
from keras import ops

import keras_compress as kc

RANK = training.WORKER[0]
FOLDER = pathlib.Path(sys.argv[2])
LAST_STEP = int(sys.argv[3]) if len(sys.argv) > 3 else None


def main():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    model = training.compressed("masked", strategy.scope())
    batches = tf.data.Dataset.from_tensor_slices(training.data()).batch(training.BATCH)
    batches = strategy.experimental_distribute_dataset(batches)
    # --8<-- [start:resume]
    saved = FOLDER / "model.weights.h5"
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)
        if saved.exists():
            model.load_weights(saved)
    step = int(ops.convert_to_numpy(model.optimizer.iterations))
    # --8<-- [end:resume]
    train_step = tf.function(distributed.step_by_hand(model, strategy))
    while step < training.EPOCHS * training.STEPS:
        with strategy.scope():
            for x, y in batches:
                if RANK == "1" and step == LAST_STEP:
                    os.kill(os.getpid(), signal.SIGKILL)
                kc.step(model, step, training.STEPS)
                train_step(x, y)
                step += 1
        # --8<-- [start:save]
        if RANK == "0":  # outside of the scope
            model.save_weights(saved)
        # --8<-- [end:save]
    kc.finish(model, step)
    np.savez(FOLDER / f"end{RANK}.npz", **training.arrays_of(model))


if __name__ == "__main__":
    main()
