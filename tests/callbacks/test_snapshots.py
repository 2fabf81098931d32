"""Snapshots against masks that the test itself looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bame_lightning import SRSTE, BAMECallback, Dense, Evidence, RigL, Schedule, StaticMask
from bame_lightning.callbacks.snapshots import MaskSnapshots
from bame_lightning.show.mask_file import FILE, Snapshots, most_restless, read_snapshots
from tests.training import Spy, Task, trainer


def bame(**kwargs: Any) -> BAMECallback:
    # A large step and no margin, so that blocks oscillate.
    evidence = Evidence(read_every=2, contenders=0.5, step_size=4.0, margin=0.0)
    return BAMECallback("2:4", **{"schedule": Schedule(every=2), "evidence": evidence, "freeze_after": 0} | kwargs)


def read(folder: Path) -> Snapshots:
    found = read_snapshots(folder)
    assert found is not None
    return found


def flat(weight: Tensor) -> Tensor:
    """Filters x positions, kernel positions first."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def test_maps_are_what_masks_and_blocks_were_then(tmp_path: Path) -> None:
    callback, seen = bame(), dict[int, Any]()

    def look(*_: Any) -> None:
        seen[callback.steps] = {
            "kept": [flat(sparse.kept.clone()) for sparse in callback.weights],
            "oscillations": [weight.oscillations.clone() for weight in callback.evolving],
        }

    # 24 steps, 22 of them in the window: adaptations after steps 2, 4, ..., 22.
    trainer(MaskSnapshots(tmp_path, at_most=4), callback, Spy(look), max_epochs=3).fit(Task())
    found = read(tmp_path)
    assert found.steps == [0, 6, 12, 16, 22]
    assert found.adaptations == [0, 3, 6, 8, 11]
    assert [(layer.label, layer.pattern) for layer in found.layers] == [(f"model.{i}", "2:4") for i in (2, 4, 6)]
    assert [(layer.filters, layer.positions) for layer in found.layers] == [(8, 36), (8, 8), (16, 128)]
    for step, maps in list(zip(found.steps, found.maps, strict=True))[1:]:
        for index, one in enumerate(maps):
            assert one.mask.equal(seen[step]["kept"][index])
            counts = seen[step]["oscillations"][index]
            assert one.oscillations is not None
            assert one.oscillations.flatten().tolist() == counts.tolist()  # 8 x 9, 8 x 2, 16 x 32 blocks: none cut
            assert one.frozen is not None
            assert one.frozen.flatten().tolist() == (counts > 0).tolist()
            assert one.tally is not None
            assert one.tally.tolist() == [int((counts == times).sum()) for times in range(33)]
    assert not found.maps[0][2].mask.equal(found.maps[-1][2].mask)
    assert found.maps[-1][2].oscillations.sum() > 0


def test_restless_blocks_are_followed_through_every_adaptation_also_after_resuming(tmp_path: Path) -> None:
    def run(folder: str, epochs: int, seen: dict[int, Any], **kwargs: Any) -> Snapshots:
        callback = bame(freeze_after=None, schedule=Schedule(0, 22, every=2))

        def look(*_: Any) -> None:
            kept = {
                sparse.label: flat(sparse.kept.clone()).view(len(sparse.kept), -1, 4) for sparse in callback.weights
            }
            counts = {layer.sparse.label: layer.oscillations.clone() for layer in callback.evolving}
            seen[callback.adaptations] = kept, counts

        fit = trainer(MaskSnapshots(tmp_path / folder, at_most=3), callback, Spy(look), max_epochs=epochs)
        fit.fit(Task(), **kwargs)
        fit.save_checkpoint(tmp_path / folder / "last.ckpt")
        return read(tmp_path / folder)

    seen = dict[int, Any]()
    whole = run("whole", 3, seen)
    assert 8 <= len(whole.traces) <= 8 * 8
    assert len({trace.key for trace in whole.traces}) == len(whole.traces)
    for trace in whole.traces:
        assert 1 <= trace.since <= 11
        assert len(trace.kept) == 11 - trace.since + 1
        for adaptation, kept in enumerate(trace.kept, trace.since):
            assert kept.equal(seen[adaptation][0][trace.label][trace.filter, trace.block])
    assert any(trace.changes > 0 for trace in whole.traces)
    # The most restless of all is among them, as often as it oscillated.
    most = max(int(counts.max()) for counts in seen[11][1].values())
    assert most_restless(whole.traces)[0].oscillations == most > 1
    # A checkpoint between two looks loses nothing.
    run("half", 1, {})
    rest = run("rest", 3, {}, ckpt_path=tmp_path / "half" / "last.ckpt")
    followed = {trace.key: trace for trace in rest.traces}
    for trace in whole.traces:
        if trace.since <= 4:
            assert followed[trace.key].kept.equal(trace.kept)


def test_never_more_than_there_are_adaptations(tmp_path: Path) -> None:
    trainer(MaskSnapshots(tmp_path), bame(freeze_after=None, schedule=Schedule(0.25, 1.0, every=5))).fit(Task())
    found = read(tmp_path)
    assert found.steps == [0, 9, 14]  # of 16 steps the first 4 are before the window
    assert found.adaptations == [0, 1, 2]
    assert [layer.freezes for layer in found.layers] == [False] * 3
    assert all(one.frozen is None and one.oscillations is not None for maps in found.maps for one in maps)


def test_other_methods_have_masks_only(tmp_path: Path) -> None:
    rigl = RigL("2:4", schedule=Schedule(0.0, 1.0, every=4))
    for method, steps in ((rigl, [0, 8, 16]), (SRSTE("2:4"), [0, 8, 16]), (StaticMask("2:4"), [0, 8, 16])):
        trainer(method, MaskSnapshots(tmp_path, at_most=2)).fit(Task())
        found = read(tmp_path)
        assert found.steps == steps
        assert (found.adaptations[0] is None) == (method is not rigl)
        assert all(one.oscillations is one.frozen is None for maps in found.maps for one in maps)
        changed = any(not a.mask.equal(b.mask) for a, b in zip(found.maps[0], found.maps[-1], strict=True))
        assert changed == (not isinstance(method, StaticMask))


def test_a_dense_run_leaves_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"of another run")
    trainer(MaskSnapshots(tmp_path), Dense("2:4")).fit(Task())
    assert not (tmp_path / FILE).exists()


def test_a_resumed_run_has_the_snapshots_from_before(tmp_path: Path) -> None:
    def run(folder: str, epochs: int, **kwargs: Any) -> None:
        fit = trainer(
            MaskSnapshots(tmp_path / folder, at_most=5), bame(schedule=Schedule(0, 22, every=2)), max_epochs=epochs
        )
        fit.fit(Task(), **kwargs)
        fit.save_checkpoint(tmp_path / folder / "last.ckpt")

    run("whole", 3)
    run("half", 1)
    assert read(tmp_path / "half").steps == [0, 4, 8]
    run("rest", 3, ckpt_path=tmp_path / "half" / "last.ckpt")
    whole, rest = read(tmp_path / "whole"), read(tmp_path / "rest")
    assert rest.steps == whole.steps == [0, 4, 8, 14, 18, 22]
    for here, there in zip(rest.maps, whole.maps, strict=True):
        assert all(a.mask.equal(b.mask) for a, b in zip(here, there, strict=True))
    state = torch.load(tmp_path / "half" / "last.ckpt", weights_only=True)["callbacks"]["MaskSnapshots"]
    assert state["snapshots"].dtype == torch.uint8


def test_accumulated_batches_are_looked_at_once(tmp_path: Path) -> None:
    trainer(MaskSnapshots(tmp_path, at_most=2), bame(), accumulate_grad_batches=2).fit(Task())
    assert read(tmp_path).steps == [0, 4, 6]  # of 8 steps


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    tasks = Task(), Task()
    trainer(bame()).fit(tasks[0])
    trainer(bame(), MaskSnapshots(tmp_path)).fit(tasks[1])
    for a, b in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True):
        assert a.equal(b)


def test_a_wrong_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"`at_most` must be .* at least 1; got 0"):
        MaskSnapshots("run", at_most=0)
