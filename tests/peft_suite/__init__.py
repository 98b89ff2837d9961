"""PEFT's own, unedited test-suite on this package's tuners.

`source` fetches the suite, `plugin` is a pytest plugin that puts our cases (`peft_cases.py`) in the place of
PEFT's, `models` has what they run on, `skips` says what would lift each skip, and `runner` starts it all.
"""
