"""What a user is told: nodes with tooltips and help, translations, the panel's routes and events, settings."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from tests.comfyui.graphs import GraphBuilder, Setting, Swapped, add_sampling, fresh, sampling_graph
from tests.comfyui.installation import REPOSITORY
from tests.comfyui.locales import LOCALES, inputs_of, own_nodes, texts_of
from tests.comfyui.processes import wait_until
from tests.comfyui.server import ComfyServer, Graph

pytestmark = pytest.mark.comfyui

STATUS = "sequence_parallel.status"
STEPS = 80
"""About three seconds: enough to be seen more than twice, by a panel that looks once a second while all is idle."""


def test_every_widget_has_a_tooltip_and_every_node_a_help_page(server: ComfyServer) -> None:
    nodes = own_nodes(server.get("/object_info"))
    assert {"SPConfig", "SPLoadDiffusionModel"} <= nodes.keys()
    for name, node in nodes.items():
        assert node["description"], name
        for widget, options in inputs_of(node).items():
            assert len(options.get("tooltip", "")) > 5, f"{name}.{widget} has no tooltip"
        page = REPOSITORY / "js" / "docs" / f"{name}.md"
        assert page.is_file(), f"{name} has no help page"
        for widget in inputs_of(node):
            assert f"**{widget}**" in page.read_text(), f"{page.name} does not explain {widget}"


def test_translations_follow_the_nodes(server: ComfyServer) -> None:
    nodes = own_nodes(server.get("/object_info"))
    english = json.loads((LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert english == {name: texts_of(node) for name, node in nodes.items()}, "run tests/comfyui/locales.py"
    served = server.get("/i18n")["zh"]
    assert served["sequenceParallel"]
    assert served["settings"]["SequenceParallel_Workers_Devices"]["name"]
    for name, texts in english.items():
        translated = served["nodeDefs"][name]
        assert translated["display_name"] and translated["description"], name
        assert translated["inputs"].keys() == texts["inputs"].keys(), name


def watch(server: ComfyServer, visible: bool) -> tuple[int, Any]:
    return server.post("/sequence_parallel/watch", {"client": server.client_id, "visible": visible})


@pytest.mark.slow
def test_a_visible_panel_sees_the_steps_and_a_hidden_one_nothing(server: ComfyServer) -> None:
    setting = Setting(width=128, height=96, length=17, steps=STEPS)
    assert server.run(sampling_graph(fresh(setting, steps=2), Swapped())).status == "success"
    status, shown = watch(server, True)
    assert status == 200
    assert shown["groups"][-1]["state"] == "idle"
    start = server.mark()
    prompt_id = server.queue(sampling_graph(fresh(setting), Swapped()))
    assert isinstance(prompt_id, str), prompt_id

    def shown_to_the_end() -> bool:
        assert watch(server, True)[0] == 200  # as a panel repeats it
        return steps_shown(server, start)[-1:] == [STEPS] and states_shown(server, start) == ["idle", "idle"]

    assert wait_until(shown_to_the_end, timeout=120, interval=2)
    result = server.wait(prompt_id)
    assert watch(server, False) == (200, {})
    seen = steps_shown(server, start)
    assert seen == sorted(seen) and len(set(seen)) > 2, seen
    events = server.events(STATUS, since=start)
    closest = min(later.when - earlier.when for earlier, later in pairwise(events))
    assert len(events) <= 4 * (events[-1].when - events[0].when) + 2, f"{len(events)} events, {closest:.2f} s apart"
    group = events[-1].data["groups"][-1]
    assert group["devices"] == "cpu,cpu"
    assert group["plan"]["ulysses"] == 2
    assert result.status == "success", result.message

    hidden = server.mark()
    assert server.run(sampling_graph(fresh(setting), Swapped())).status == "success"
    kinds = [event.kind for event in server.events(since=hidden)]
    assert STATUS not in kinds[kinds.index("execution_start") :]  # what was on its way came before


def steps_shown(server: ComfyServer, since: int) -> list[int]:
    samplings = [
        group["sampling"]
        for event in server.events(STATUS, since=since)
        for group in event.data["groups"]
        if group["sampling"] is not None and group["sampling"]["steps"] == STEPS
    ]
    return [sampling["step"] for sampling in samplings]


def states_shown(server: ComfyServer, since: int) -> list[str]:
    """Of the ranks, the last time."""
    return [rank["state"] for rank in server.events(STATUS, since=since)[-1].data["groups"][-1]["ranks"]]


def test_a_panel_that_is_not_connected_is_refused(server: ComfyServer) -> None:
    status, answer = server.post("/sequence_parallel/watch", {"client": "another", "visible": True})
    assert (status, answer) == (404, {"error": "no such client is connected"})


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"ulysses_degree": 3}, "ulysses_degree 3: the product of the degrees must be the number of devices, 2"),
        ({"devices": "tpu"}, "devices has the item 'tpu'; allowed are"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_before_queueing(
    server: ComfyServer, wrong: dict[str, Any], complaint: str
) -> None:
    result = server.run(sampling_graph(fresh(Setting()), Swapped(**wrong)))
    assert result.status == "rejected"
    assert result.message.count(complaint) == 1, result.message


def without_config(setting: Setting) -> Graph:
    builder = GraphBuilder()
    dtype = setting.weight_dtype
    model = builder.add("SPLoadDiffusionModel", unet_name=setting.checkpoint, weight_dtype=dtype)
    add_sampling(builder, setting, model)
    return builder.graph


@contextmanager
def stored(server: ComfyServer, **values: Any) -> Iterator[None]:
    """As the settings dialog stores them."""
    before = {name: server.get(f"/settings/SequenceParallel.{name}") for name in values}

    def store(wanted: dict[str, Any]) -> None:
        settings = {f"SequenceParallel.{name}": value for name, value in wanted.items()}
        body = json.dumps(settings).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/settings", body, headers), timeout=10).close()

    store(values)
    yield
    store(before)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("Workers.Devices", "tpu", ("Default devices", "'tpu'")),
        ("Sampler.PreviewIntervalSeconds", -1, ("Preview interval is -1", "allowed are 0 or more seconds")),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(
    server: ComfyServer, setting: str, value: object, said: tuple[str, str]
) -> None:
    with stored(server, **{setting: value}):
        result = server.run(without_config(fresh(Setting())))
    assert result.status == "error"
    for part in ("setting Sequence Parallel, ", *said):
        assert part in result.message, result.message


def test_the_log_level_decides_what_is_logged(server: ComfyServer) -> None:
    for level, dtype in (("error", "fp8_e4m3fn"), ("comfyui", "fp8_e5m2")):
        start = len(server.log())
        with stored(server, **{"Log.Level": level, "Workers.Devices": "cpu,cpu"}):
            assert server.run(without_config(fresh(Setting(weight_dtype=dtype)))).status == "success"
        assert ("plan on cpu,cpu" in server.log()[start:]) == (level == "comfyui")


@pytest.mark.slow
def test_idle_workers_leave_when_the_setting_says_so(server: ComfyServer) -> None:
    assert server.run(sampling_graph(fresh(Setting()), Swapped())).status == "success"
    assert server.workers()
    with stored(server, **{"Workers.KeepAliveMinutes": 0.05}):
        assert wait_until(lambda: not server.workers(), timeout=30)
    assert wait_until(lambda: server.get("/sequence_parallel/status") == {"groups": []}, timeout=60)


def test_the_report_has_versions_settings_and_workers(server: ComfyServer) -> None:
    with stored(server, **{"Workers.KeepAliveMinutes": 30}):
        text = server.get("/sequence_parallel/report")["text"]
    for part in ("torch ", "ComfyUI 0.", "diffusers ", '"keep_alive_minutes": 30', '"devices"', "Last errors:"):
        assert part in text, text
    assert str(server.base) not in text.partition("Last errors:")[0], "the report tells where the files are"


@pytest.mark.slow
def test_the_workers_log_lies_where_only_the_report_shows_it(server: ComfyServer) -> None:
    assert server.run(sampling_graph(fresh(Setting()), Swapped())).status == "success"
    log = server.base / "user" / "__sequence_parallel" / "workers-cpu-cpu.log"
    assert "[host] workers started in " in log.read_text()
    assert f"End of {log.name}:" in server.get("/sequence_parallel/report")["text"]
    for path in (f"..%2F{log.parent.name}%2F{log.name}", f"{log.parent.name}%2F{log.name}"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/userdata/{path}", timeout=10)
        assert refused.value.code in (403, 404)
