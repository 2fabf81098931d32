"""Files of weights and checkpoints: read them safely, audit them, export them."""
