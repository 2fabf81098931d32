"""The help of every command that is not Hydra's."""

import importlib

import pytest

WORDS = {
    "audit": ("saved pattern", "--dense", "exit status"),
    "compare": ("paired", "95 %", "compare.csv", "exit status"),
    "dashboard": ("--entity", "wandb login", "exit status"),
    "export": ("semi_structured", "bame-lightning[export]", "exit status"),
    "report": ("metrics.csv", "no network", "exit status"),
}


@pytest.mark.parametrize("command", WORDS)
def test_help_explains_the_command_in_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"bame_lightning.cli.{command}").main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for words in WORDS[command]:
        assert words in out
    assert max(map(len, out.splitlines())) <= 80
