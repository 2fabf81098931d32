"""Find the folder of the configuration groups."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """Find the configuration groups: inside the installed package, or in the repository of an editable install.

    Returns:
        The folder that holds `config.yaml`.

    Raises:
        FileNotFoundError: If neither place has it.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "conf", package.parents[1] / "conf")
    found = next((place for place in places if (place / "config.yaml").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"The configuration groups of bame_lightning are in neither {places[0]} nor {places[1]}."
        )
    return found
