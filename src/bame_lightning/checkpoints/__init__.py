"""Files of weights and checkpoints: read them safely, judge them, hand them on."""
