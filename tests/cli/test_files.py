"""`bame-audit` and `bame-export` on files as other people write them: everything is read, or it is said what was not."""

import argparse
import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bame_lightning.cli.audit import main as audit
from bame_lightning.cli.export import main as export
from tests.checkpoints.export.models import entry

SPARSE = {"fc.weight": torch.eye(8), "fc.bias": torch.ones(8)}
DENSE = {"fc.weight": torch.ones(8, 8), "fc.bias": torch.ones(8)}

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in an own folder; returns its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(command: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
        status = command([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def refused(call: Call, *arguments: object) -> str:
    """The one line with which an audit ends that read nothing."""
    status, out, err = call(audit, *arguments, "--pattern", "1:8")
    assert (status, out, err.count("\n")) == (1, "", 1)
    return err


# Several sets of weights


@pytest.mark.parametrize("key", ["model_state_dict", "net", "params_ema", "module", "generator"])
def test_the_only_set_of_weights_is_found_under_any_key(call: Call, key: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(8, 8)}}, "param_groups": []}
    torch.save({"epoch": 3, "best": torch.tensor(0.5), key: SPARSE, "optimizer": optimizer}, "a.pt")
    status, out, _ = call(audit, "a.pt", "--pattern", "1:8")
    assert status == 0
    assert "OK: all 8 blocks obey." in out
    assert "Not read" not in out


@pytest.mark.parametrize(("first", "second"), [("params", "params_ema"), ("generator", "discriminator")])
def test_several_sets_of_weights_are_told_and_chosen_by_key(call: Call, first: str, second: str) -> None:
    torch.save({first: SPARSE, second: DENSE}, "a.pt")
    told = refused(call, "a.pt")
    assert f"several sets of weights: '{first}' (2 tensors), '{second}' (2 tensors)" in told
    assert f"--key '{second}'" in told
    status, out, _ = call(audit, "a.pt", "--pattern", "1:8", "--key", first)
    assert status == 0
    assert f"OK: all 8 blocks of '{first}' obey." in out
    assert f"Not read: '{second}' (2 tensors; --key '{second}')" in out
    assert call(audit, "a.pt", "--pattern", "1:8", "--key", second)[0] == 1
    assert "has no weights under `key` 'ema'" in refused(call, "a.pt", "--key", "ema")


@pytest.mark.parametrize("main_key", ["state_dict", "model"])
def test_what_lies_beside_the_model_is_said_not_to_be_read(call: Call, main_key: str) -> None:
    torch.save({main_key: SPARSE, "ema": {"decay": 0.9, "shadow": DENSE}}, "a.pt")
    status, out, _ = call(audit, "a.pt", "--pattern", "1:8")
    assert status == 0
    assert f"OK: all 8 blocks of '{main_key}' obey." in out
    assert "Not read: 'ema.shadow' (2 tensors; --key 'ema.shadow')" in out
    assert call(audit, "a.pt", "--pattern", "1:8", "--key", "ema.shadow")[0] == 1


def test_a_second_network_is_not_judged_by_the_masks_of_the_first(call: Call) -> None:
    layers = {"fc.weight": entry(SPARSE["fc.weight"] != 0, "1:8")}
    callbacks = {"BAME": {"nm_sparsity_version": 2, "layers": layers}}
    torch.save({"state_dict": SPARSE, "teacher": {"head.weight": torch.ones(4, 8)}, "callbacks": callbacks}, "a.ckpt")
    assert call(audit, "a.ckpt")[0] == 0
    status, _, err = call(audit, "a.ckpt", "--key", "teacher")
    assert (status, "Give `pattern`" in err) == (1, True)


# Names


class Wrapped(nn.Module):
    """As FSDP and activation checkpointing wrap modules inside a network."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block._fsdp_wrapped_module = nn.Module()
        self.block._fsdp_wrapped_module._checkpoint_wrapped_module = small()


def small() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].weight.data = torch.eye(8)
    return net


@pytest.mark.parametrize(
    ("wrap", "dropped"),
    [
        (torch.compile, "_orig_mod."),
        (lambda net: nn.ModuleDict({"module": net}), "module."),
        (lambda net: nn.ModuleDict({"module": torch.compile(net)}), "_orig_mod., module."),
        (AveragedModel, "module."),
    ],
)
def test_names_of_wrappers_are_dropped_and_said(call: Call, wrap: Any, dropped: str) -> None:
    net = small()
    torch.save(wrap(net).state_dict(), "a.pt")
    status, out, _ = call(audit, "a.pt", "--pattern", "1:8", "--dense", "2")
    assert status == 0
    assert f"without {dropped}" in out
    assert "0.weight" in out.split()
    status, out, _ = call(
        export, "a.pt", "--pattern", "1:8", "--dense", "2", "--format", "dense", "--output", "b.safetensors"
    )
    assert status == 0
    assert f"Dropped from names: {dropped}" in out
    plain = small()
    plain.load_state_dict(load_file("b.safetensors"))  # strict
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), net.parameters(), strict=True))


def test_wrappers_inside_a_network_are_dropped_too(call: Call) -> None:
    torch.save(Wrapped().state_dict(), "a.pt")
    status, out, _ = call(audit, "a.pt", "--pattern", "1:8", "--dense", "block.2")
    assert status == 0
    assert "block.0.weight" in out.split()


def test_a_saved_state_of_a_compiled_network_fits_its_weights(call: Call) -> None:
    state = {f"model._orig_mod.{name}": value for name, value in SPARSE.items()}
    layers = {"model._orig_mod.fc.weight": entry(SPARSE["fc.weight"] != 0, "1:8")}
    callbacks = {"BAME": {"nm_sparsity_version": 2, "layers": layers}}
    torch.save({"state_dict": state, "callbacks": callbacks, "pytorch-lightning_version": "2.6"}, "a.ckpt")
    status, out, _ = call(audit, "a.ckpt")
    assert (status, "model.fc.weight" in out.split()) == (0, True)
    assert call(export, "a.ckpt", "--format", "dense", "--output", "b.safetensors")[0] == 0
    assert sorted(load_file("b.safetensors")) == ["fc.bias", "fc.weight"]


def test_a_prefix_that_a_plain_model_may_lack_is_said(call: Call) -> None:
    torch.save({f"net.{name}": value for name, value in SPARSE.items()}, "a.pt")
    status, out, _ = call(export, "a.pt", "--pattern", "1:8", "--format", "packed", "--output", "b.safetensors")
    assert status == 0
    assert "All names begin with 'net.'; --prefix net. drops it" in out


# Objects beside weights


class Config:
    """A configuration of a user's own class."""

    def __init__(self) -> None:
        self.width = 8


@pytest.mark.parametrize(
    "config",
    [argparse.Namespace(lr=0.1), OmegaConf.create({"lr": 0.1, "sizes": [1, 2]}), Config(), Path("data"), small()],
    ids=lambda config: type(config).__name__,
)
def test_a_config_object_beside_the_weights_is_passed_over_and_named(call: Call, config: Any) -> None:
    torch.save({"model": SPARSE, "config": config, "epoch": 3}, "a.pt")
    status, out, _ = call(audit, "a.pt", "--pattern", "1:8")
    assert status == 0
    assert "'config' (an object of " in " ".join(out.split())


class Witness:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("witness"),)


@pytest.mark.parametrize("function", [os.system, eval, pickle.loads, torch.hub.load], ids=lambda one: one.__name__)
def test_what_runs_code_is_refused(call: Call, function: Any) -> None:
    torch.save({"model": SPARSE, "config": function}, "a.pt")
    assert "which may run code when loaded" in refused(call, "a.pt")


def test_what_is_passed_over_is_not_run(call: Call) -> None:
    torch.save({"model": SPARSE, "config": Witness()}, "a.pt")
    call(audit, "a.pt", "--pattern", "1:8")
    assert not Path("witness").exists()
    torch.load("a.pt", weights_only=False)
    assert Path("witness").exists(), "this test could not fail"


def test_a_whole_network_is_refused_by_its_class(call: Call) -> None:
    torch.save({"model": Config(), "epoch": 3}, "a.pt")
    told = refused(call, "a.pt")
    assert "its keys are 'model', an object of tests.cli.test_files.Config; 'epoch'" in told


# Adapters


@pytest.mark.parametrize("name", ["q.lora_A.default.weight", "q.lora_down.weight", "v.hada_w1_a", "k.ia3_l"])
def test_adapters_are_refused_with_the_remedy(call: Call, name: str) -> None:
    torch.save({**SPARSE, name: torch.ones(4, 8)}, "a.pt")
    told = refused(call, "a.pt")
    assert f"an adapter (`{name}`)" in told
    assert "merge_and_unload" in told


def test_the_folder_of_an_adapter_is_refused_with_the_remedy(call: Call) -> None:
    Path("adapter_config.json").write_text("{}")
    save_file({"q.lora_A.weight": torch.ones(4, 8)}, "adapter_model.safetensors")
    assert "merge_and_unload" in refused(call, ".")


# Shards, folders, safetensors


def shards(kind: str) -> str:
    """Write two shards and their index; returns its name."""
    parts = {"fc.weight": torch.eye(8)}, {"head.weight": torch.eye(8)}
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        save_file(part, file, {"format": "pt"}) if kind == "safetensors" else torch.save(part, file)
        places |= dict.fromkeys(part, file)
    Path(f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return f"{stem}.{suffix}.index.json"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_all_shards_are_read_by_their_index_or_folder(call: Call, kind: str) -> None:
    index = shards(kind)
    for path in (index, "."):
        status, out, _ = call(audit, path, "--pattern", "1:8")
        assert status == 0
        assert "OK: all 16 blocks obey." in out
    [second] = Path.cwd().glob("*-00002-of-*")
    status, out, _ = call(audit, second, "--pattern", "1:8")
    assert (status, "Not read: the other 1 of 2 shards" in out) == (0, True)
    second.unlink()
    assert f"needs the file {second.name}" in refused(call, index)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_does_not_lead_out_of_its_folder(call: Call, place: str) -> None:
    Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": place}}))
    assert "does not lie in its own folder" in refused(call, "model.safetensors.index.json")


def test_a_shard_without_a_weight_of_the_index_is_named(call: Call) -> None:
    save_file({"other": torch.eye(8)}, "a.safetensors")
    Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "a.safetensors"}}))
    assert "names `fc.weight` in the shard a.safetensors, which does not hold it" in refused(call, ".")


def test_a_folder_of_one_file_is_read_and_others_are_listed(call: Call) -> None:
    save_file(SPARSE, "model.safetensors")
    torch.save({"lr": 0.1}, "training_args.bin")
    status, out, _ = call(audit, ".", "--pattern", "1:8")
    assert status == 0
    assert "Not read: training_args.bin" in out
    run = Path("run", "checkpoints")
    run.mkdir(parents=True)
    torch.save(SPARSE, run / "last.ckpt")
    assert "It holds checkpoints/last.ckpt" in refused(call, "run")


def test_torn_safetensors_are_refused(call: Call) -> None:
    save_file(SPARSE, "a.safetensors")
    whole = Path("a.safetensors").read_bytes()
    for size in (9, 60, len(whole) - 1):
        Path("a.safetensors").write_bytes(whole[:size])
        assert "is damaged" in refused(call, "a.safetensors")


# Distributed checkpoints


def saved_distributed(contents: Mapping[str, Any], folder: str = "dist") -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save(dict(contents), checkpoint_id=folder, no_dist=True)
    return Path(folder)


def test_a_folder_of_a_distributed_checkpoint_is_read(call: Call) -> None:
    optimizer = {"state": {"fc.weight": {"exp_avg": torch.ones(8, 8)}}}
    folder = saved_distributed({"model": SPARSE, "ema": DENSE, "optimizer": optimizer, "epoch": 3})
    status, out, _ = call(audit, folder, "--pattern", "1:8")
    assert status == 0
    assert "OK: all 8 blocks of 'model' obey." in out
    assert "Not read: 'ema' (2 tensors; --key 'ema')" in out
    assert call(audit, folder, "--pattern", "1:8", "--key", "ema")[0] == 1
    assert (
        call(export, folder, "--pattern", "1:8", "--format", "dense", "--output", "b.safetensors", "--key", "model")[0]
        == 0
    )
    assert {name: tensor.tolist() for name, tensor in load_file("b.safetensors").items()} == {
        name: tensor.tolist() for name, tensor in SPARSE.items()
    }


def test_a_distributed_checkpoint_of_lightning_brings_its_masks(call: Call) -> None:
    folder = saved_distributed({"state_dict": SPARSE, "optimizer_0": {"lr": torch.ones(8, 8)}})
    layers = {"fc.weight": entry(SPARSE["fc.weight"] != 0, "1:8")}
    torch.save({"epoch": 3, "callbacks": {"BAME": {"nm_sparsity_version": 2, "layers": layers}}}, folder / "meta.pt")
    status, out, _ = call(audit, folder)
    assert status == 0
    assert "OK: all 8 blocks obey." in out


def test_damaged_distributed_checkpoints_are_refused(call: Call) -> None:
    folder = saved_distributed({"model": SPARSE})
    [data] = folder.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    assert "which is damaged" in refused(call, folder)
    data.unlink()
    assert f"needs the file {data.name}" in refused(call, folder)
    (folder / ".metadata").write_bytes(b"\x80\x02K\x01.")
    assert "has a .metadata that is damaged" in refused(call, folder)


def test_metadata_of_a_distributed_checkpoint_run_no_code(call: Call) -> None:
    folder = saved_distributed({"model": SPARSE})
    (folder / ".metadata").write_bytes(pickle.dumps(Witness()))
    refused(call, folder)
    assert not Path("witness").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert Path("witness").exists(), "this test could not fail"


# Our own exports


@pytest.mark.parametrize("kind", ["dense", "packed", "semi_structured"])
def test_an_export_says_its_pattern_itself(call: Call, kind: str) -> None:
    sparse = torch.tensor([0.0, 1.0, 0.0, 2.0]).tile(64, 32)
    torch.save({"fc.weight": sparse, "head.weight": torch.ones(3, 128)}, "a.pt")
    arguments = ("--pattern", "2:4", "--dense", "head", "--format", kind, "--output", "b.safetensors")
    assert call(export, "a.pt", *arguments, "--dtype", "float16")[0] == 0
    status, out, _ = call(audit, "b.safetensors")
    assert status == 0
    assert "OK: all 2,048 blocks obey." in out
    assert "head.weight" in out
    assert call(audit, "b.safetensors", "--pattern", "1:4")[0] == 1
    assert call(export, "b.safetensors", "--format", "packed", "--output", "c.safetensors")[0] == 0


def test_an_export_whose_weights_were_changed_fails(call: Call) -> None:
    torch.save(SPARSE, "a.pt")
    assert call(export, "a.pt", "--pattern", "1:8", "--format", "dense", "--output", "b.safetensors")[0] == 0
    from safetensors import safe_open

    with safe_open("b.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(DENSE, "b.safetensors", metadata)
    status, out, _ = call(audit, "b.safetensors")
    assert status == 1
    assert "fc.weight violates 1:8" in out


def test_an_export_without_its_layers_is_refused(call: Call) -> None:
    for layers in (
        "[",
        "[]",
        '{"fc.weight": {"pattern": "1:8"}}',
        '{"no.weight": {"pattern": "1:8", "shape": [8, 8]}}',
    ):
        tensors: dict[str, Tensor] = dict(SPARSE)
        save_file(tensors, "b.safetensors", {"format": "pt", "nm_layers": layers})
        status, out, err = call(audit, "b.safetensors")
        assert (status, out, err.count("\n")) == (1, "", 1)
