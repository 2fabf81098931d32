"""`bame-dashboard` against a stand-in for W&B's server on this machine."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import wandb

from bame_lightning.cli.dashboard import main

ARGUMENTS = ["--entity", "me", "--project", "sparse"]


class Server(ThreadingHTTPServer):
    """Answers the two calls that `Workspace.save` makes, and keeps what they said."""

    views: list[dict[str, Any]]
    refuses = False

    class Handler(BaseHTTPRequestHandler):
        server: Server

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reply: dict[str, Any] = {}
            if self.path.endswith("/graphql"):
                call = json.loads(body)
                if "UpsertView2" in call["query"]:
                    self.server.views.append(call["variables"])
                    view = {"id": "view", "name": call["variables"]["name"]}
                    reply = {"data": {"upsertView": {"view": view, "inserted": True}}}
                    if self.server.refuses:
                        reply = {"errors": [{"message": "permission denied"}], "data": {"upsertView": None}}
                else:
                    assert "viewer" in call["query"]
                    viewer = {"id": "U", "username": "me", "entity": "me", "teams": {"edges": []}, "flags": "{}"}
                    reply = {"data": {"viewer": viewer}}
            out = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_: Any) -> None:
            pass


@pytest.fixture
def server(logged_out: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Server.Handler)
    server.views = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()
    yield server
    server.shutdown()
    server.server_close()


def panels(view: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The configuration of the panels of a view that was sent, by section."""
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}


def test_a_workspace_of_five_sections_is_sent(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--layers", "model.conv"]) == 0
    (view,) = server.views
    address = f"http://127.0.0.1:{server.server_port}/me/sparse?nw="
    assert capsys.readouterr().out.startswith(f"Built: {address}")
    assert (view["entityName"], view["projectName"], view["type"]) == ("me", "sparse", "project-view")
    found = panels(view)
    assert list(found) == ["Oscillation", "Masks", "FLOPs", "Quality", "Sweep"]
    lines = [panel for section in list(found.values())[:4] for panel in section if "metrics" in panel]
    assert {panel["xAxis"] for panel in lines if "xAxis" in panel} == {"trainer/global_step"}
    rates = {f"bame/{name}" for name in ("oscillation_rate", "oscillations_total", "flip_rate", "frozen_fraction")}
    assert rates <= keys(found["Oscillation"])
    (flips,) = (panel for panel in found["Oscillation"] if panel.get("metrics") == ["bame/flip_rate"])
    assert flips["yLogScale"] is True
    assert {"bame/survival", "bame/density"} <= keys(found["Masks"])
    assert {"flops/train_total", "flops/train_vs_dense", "flops/train_vs_sr_ste"} <= keys(found["FLOPs"])
    assert {"train/loss", "val/loss", "train/accuracy", "val/accuracy"} <= keys(found["Quality"])
    regexes = {panel["metricRegex"] for panel in found["Oscillation"] if panel.get("useMetricRegex")}
    assert "bame/layer/.*/oscillation_frequency" in regexes
    assert ["bame/restless_blocks"] in [panel.get("mediaKeys") for panel in found["Oscillation"]]
    media = [panel["mediaKeys"] for panel in found["Masks"] if "mediaKeys" in panel]
    assert media == [["bame/maps/model.conv/mask", "bame/maps/model.conv/oscillations"]]
    scatter = [(panel["xAxis"], panel["yAxis"]) for panel in found["Sweep"] if "yAxis" in panel]
    assert ("summary:flops/train_total", "summary:test/accuracy") in scatter
    assert ("config:nm_sparsity.value.pattern", "summary:test/accuracy") in scatter


def keys(section: list[dict[str, Any]]) -> set[str]:
    return {key for panel in section for key in panel.get("metrics", [])}


def test_a_refusal_is_told_in_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.refuses = True
    assert main(ARGUMENTS) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bame-dashboard")]
    assert "`--entity` me and `--project` sparse" in line
    assert "permission denied" in line
    assert "The project must exist" in line


@pytest.mark.usefixtures("logged_out")
def test_without_a_login_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGUMENTS) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r"bame-dashboard: error: nobody is logged in to W&B at https://\S+\. Run `wandb login`", err)
    assert "bame-report" in err
    assert len(err.splitlines()) == 1


def test_without_the_package_it_says_how_to_install_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "bame_lightning.show.dashboard", raising=False)
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(ARGUMENTS) == 1
    assert "pip install 'bame-lightning[dashboard]'" in capsys.readouterr().err
    assert not server.views
