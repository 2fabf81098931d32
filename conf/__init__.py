"""Configuration groups of the `bame-*` commands; `pkg://bame_lightning.conf` on a Hydra search path finds them."""
