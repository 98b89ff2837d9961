"""What would lift the skips that PEFT's own tests hold, most of which are about some of PEFT's tuners alone."""

from __future__ import annotations

import re

RUNS = " -- runs "

_BIAS = "for a config with PEFT's field `bias`; these tuners have none, since biases they train are the adapter's"
_PROMPTS = "for prompt learning, which adds tokens and adapts no module"
_MIXED = (
    "once PEFT's test asks a tuner what it can do, and not for LoraConfig; here test_verbs.py and "
    "test_far_training.py do mixed batches on transformers models, and PEFT's tests on an MLP are run"
)
_BY_NAME = (
    "for what PEFT's test names: LoRA and IA3 (weighted sums; here test_weighted_adapters.py does them), or prompt "
    "learning (its tasks)"
)
#: By a pattern of PEFT's reason. The test of this suite fails on a reason that is not among them.
LIFTS = {
    r"This test requires the PEFT method to support training the bias directly": _BIAS,
    r"Testing bias warnings only for LoraConfig or BOFTConfig": _BIAS,
    r"does not support the 'bias' argument": _BIAS,
    r"Mixed adapter batches not supported for": _MIXED,
    r"Test not applicable for <class": _BY_NAME,
    r"This test does not apply to <class": _PROMPTS,
    r"Skip tests that are not prompt learning": _PROMPTS,
    r"This test is only for prompt learning methods": _PROMPTS,
    r"Multiple active adapters with modules_to_save": "for cases without modules_to_save, of which PEFT adds none up",
}


def with_lift(reason: str) -> str:
    """A reason with what would lift it; as it is where that is unknown, or said already."""
    if RUNS in reason:
        return reason
    lifts = [lift for pattern, lift in LIFTS.items() if re.search(pattern, reason)]
    return f"{reason}{RUNS}{lifts[0]}" if lifts else reason
