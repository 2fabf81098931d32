from pathlib import Path

import pytest
import torch

from bame_lightning.show.mask_file import FILE, Layer, LayerMaps, Snapshots, Trace, read_snapshots

LAYERS = [Layer("a", "2:4", 3, 8, True), Layer("b.in_proj_weight", "1:16", 5, 48, False)]


def some() -> Snapshots:
    found = Snapshots(LAYERS)
    generator = torch.Generator().manual_seed(0)
    for step, adaptation in ((0, 0), (20, 10), (40, None)):
        oscillations = torch.randint(0, 5000, (3, 2), generator=generator, dtype=torch.int32)
        tally = torch.randint(0, 9, (33,), generator=generator)
        maps = [
            LayerMaps(torch.rand(3, 8, generator=generator) > 0.5, oscillations, oscillations > 1000, tally),
            LayerMaps(torch.rand(5, 48, generator=generator) > 0.9),
        ]
        found.add(step, adaptation, maps)
    kept = torch.rand(11, 8, generator=generator) > 0.5
    found.traces = [Trace("a", 2, 0, since=3, oscillations=5, kept=kept), Trace("b", 1, 2, 9, 1, kept[:1])]
    return found


def assert_equal(found: Snapshots, expected: Snapshots) -> None:
    assert found.layers == expected.layers
    assert found.steps == expected.steps
    assert found.adaptations == expected.adaptations
    for one, other in zip(found.traces, expected.traces, strict=True):
        assert (one.key, one.since, one.oscillations) == (other.key, other.since, other.oscillations)
        assert one.kept.equal(other.kept)
    for here, there in zip(found.maps, expected.maps, strict=True):
        for a, b in zip(here, there, strict=True):
            assert a.mask.equal(b.mask)
            for values, others in ((a.oscillations, b.oscillations), (a.frozen, b.frozen), (a.tally, b.tally)):
                assert values is others is None or values.equal(others)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(some().to_bytes())
    found = read_snapshots(tmp_path)
    assert found is not None
    assert_equal(found, some())


def test_none_yet() -> None:
    assert_equal(Snapshots.from_bytes(Snapshots(LAYERS).to_bytes()), Snapshots(LAYERS))
    assert read_snapshots(Path("nowhere")) is None


def test_steps_that_are_taken_again_replace_their_snapshots() -> None:
    found = some()
    again = found.maps[1]
    found.drop_after(20)
    assert found.steps == [0, 20]
    assert len(found.maps) == len(found.adaptations) == 2
    found.add(20, 11, again)
    assert (found.steps, found.adaptations) == ([0, 20], [0, 11])


@pytest.mark.parametrize("contents", [b"", b"no archive", some().to_bytes()[:300]])
def test_a_broken_file_is_named(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(contents)
    with pytest.raises(ValueError, match=rf"{FILE} is not snapshots .* Remove it"):
        read_snapshots(tmp_path)
