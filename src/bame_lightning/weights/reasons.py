"""Why weights stay dense, in the words of the table of layers, and what a user can do about each reason."""

from __future__ import annotations

import re
from collections.abc import Iterable

FROZEN = "not trained (requires_grad=False)"
UNHELD = "not trained (in no optimizer)"
UNREACHED = "not trained (the loss does not reach it)"
UNTRAINED = frozenset({FROZEN, UNHELD, UNREACHED})
"""Reasons that may end during training: a weight may be unfrozen, handed to an optimizer, or reached by the loss later."""
COMPUTED = "not multiplied itself, but what is computed from it"
"""For weight norm, weight standardisation or fake quantisation: zeros of the parameter may not be zeros in the product."""
CLASSIFIER = "classifier (last linear layer)"
ADAPTER = "adapter (merged, it would fill the zeros of its base)"
ADAPTER_NAME = re.compile(r"(^|[._])(lora|loha|lokr|hada|ia3|oft|boft|vera|dora)_")
"""Finds the part of a weight's name that shows an adapter."""
NO_VIEW = "no N:M view for"
FUSED = "several matrices fused into one weight"
INDIVISIBLE = "is not divisible by"

_ADVICE = {
    INDIVISIBLE: "choose an M that divides input dimensions",
    CLASSIFIER: "name the classifier with `layers={name: pattern}`",
    FROZEN: "unfreeze layers before fit",
    UNHELD: "hand the layers' parameters to the optimizer in `configure_optimizers`",
    UNREACHED: "compute the loss from the layers, with gradients switched on",
    COMPUTED: (
        "train the plain parameter (`torch.nn.utils.parametrize.remove_parametrizations`, or the layer without weight norm, "
        "standardisation or fake quantisation)"
    ),
    ADAPTER: "train the base weights instead of adapters",
    FUSED: "split fused weights into linear layers",
    NO_VIEW: (
        "train linear layers, convolutions or `nn.MultiheadAttention`; embeddings, recurrent layers and transposed "
        "convolutions cannot be N:M sparse"
    ),
    "dense by the rule": "drop rules that say 'dense'",
}


def advice(reasons: Iterable[str]) -> str:
    """Say in one sentence what helps against these reasons; empty if nothing is known to help.

    Example:
        >>> advice(["input dimension 3 is not divisible by 4", FROZEN])
        'Choose an M that divides input dimensions, or unfreeze layers before fit.'
    """
    reasons = list(reasons)
    found = [remedy for key, remedy in _ADVICE.items() if any(key in reason for reason in reasons)]
    sentence = ", or ".join(found)
    return f"{sentence[0].upper()}{sentence[1:]}." if found else ""
