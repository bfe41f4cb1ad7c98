"""All cases of how channels move, collected."""

import channel_cases_layers  # noqa: F401
import channel_cases_moves  # noqa: F401
import channel_cases_nested  # noqa: F401
import channel_cases_values  # noqa: F401
from channel_case import CASES, made  # noqa: F401
