"""The sidebar panel, the toasts and the settings, as a user meets them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.frontend import FrontEnd
from tests.comfyui.graphs import GraphBuilder, Setting, Swapped, add_sampling, fresh, sampling_graph
from tests.comfyui.processes import wait_until
from tests.distributed.process_facts import limit_memory

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = [pytest.mark.comfyui, pytest.mark.browser, pytest.mark.slow]

# Never finished: there is time to watch, to cancel and to kill.
LONG = Setting(width=192, height=192, length=33, steps=400)
TIMEOUT_MS = 120_000


class Panel:
    """The panel of a page, opened."""

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        self.page = front_end.page
        self.root = self.page.locator(".sp-panel")
        self.open()

    def open(self) -> None:
        self.page.get_by_role("button", name="Sequence Parallel").first.click()
        self.root.wait_for(timeout=10_000)

    def close(self) -> None:
        self.page.get_by_role("button", name="Sequence Parallel").first.click()
        self.root.wait_for(state="hidden", timeout=10_000)

    def press(self, button: str) -> None:
        self.root.get_by_role("button", name=button).click()

    def wait_for(self, text: str) -> str:
        """Waits until the panel shows what matches; all that it shows then."""
        self.root.get_by_text(re.compile(text)).first.wait_for(timeout=TIMEOUT_MS)
        return self.root.inner_text()

    def toasts(self, text: str) -> Locator:
        """The toasts that match."""
        # Up to 1.49 they are PrimeVue's, later items of a list.
        return self.page.locator(".p-toast-message, li[role='alert'], li[role='status']").filter(
            has_text=re.compile(text)
        )

    def wait_for_toast(self, text: str) -> None:
        self.toasts(text).first.wait_for(timeout=TIMEOUT_MS)

    def step(self) -> int:
        """How many steps are shown as done."""
        found = re.search(r"Step (\d+) of", self.root.inner_text())
        return int(found[1]) if found else 0


def gone(front_end: FrontEnd) -> bool:
    """Whether nothing runs any more."""
    front_end.page.wait_for_timeout(100)
    return not front_end.server.get("/queue")["queue_running"]


@pytest.mark.timeout(600)
def test_a_user_watches_cancels_meets_a_crash_and_restarts(front_end: FrontEnd, tmp_path: Path) -> None:
    panel, server = Panel(front_end), front_end.server
    front_end.load_graph(sampling_graph(fresh(LONG), Swapped()))
    assert front_end.queue()
    panel.wait_for(r"Step \d+ of 400 · \d+(\.\d+)? m?s per step")
    first = panel.step()
    assert wait_until(lambda: panel.step() > first, timeout=60), "the panel does not count"
    text = panel.root.inner_text()
    for part in (
        "Sampling",
        "ulysses 2 × ring 1 × cfg 1 × dp 1",
        "auto: Ulysses",
        "exchanges",
        "Exposed",
        "Rank 1 · cpu",
        "MiB",
    ):
        assert part in text, text
    assert panel.root.get_by_role("img", name=re.compile("weights, .* activations, .* free of")).count() == 2
    panel.page.screenshot(path=tmp_path / "sampling.png")

    front_end.page.get_by_role("button", name="Cancel current run").first.click()
    assert wait_until(lambda: gone(front_end), timeout=60)
    panel.wait_for("^Idle$")
    assert 0 < panel.step() < LONG.steps

    front_end.load_graph(sampling_graph(fresh(LONG, steps=401), Swapped()))
    assert front_end.queue()
    panel.wait_for(r"Step \d+ of 401")
    server.workers()[-1].kill()
    panel.wait_for_toast("Workers failed")
    shown = panel.wait_for("was ended by SIGKILL")
    assert re.search(r"Rank \d · cpu\s+Failed", shown), shown
    assert front_end.page.locator(".workflow-tabs-container").get_by_text("Workers failed").count() == 1
    panel.page.screenshot(path=tmp_path / "crashed.png")

    panel.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel.press("Copy report")
    panel.wait_for_toast("The report is in the clipboard")
    report = panel.page.evaluate("navigator.clipboard.readText()")
    assert "was ended by SIGKILL" in report and "torch" in report

    assert wait_until(lambda: gone(front_end), timeout=60)
    panel.press("Restart workers")
    panel.wait_for_toast("Workers started")
    panel.wait_for("^Idle$")
    assert front_end.page.locator(".workflow-tabs-container").get_by_text("Workers failed").count() == 0
    workers = [worker.pid for worker in server.workers()]
    front_end.load_graph(sampling_graph(fresh(Setting()), Swapped()))
    assert front_end.run(timeout=120)["status"]["status_str"] == "success"
    panel.wait_for("Step 3 of 3")
    assert [worker.pid for worker in server.workers()] == workers, "the prompt started others"
    assert front_end.own_errors() == []


def test_out_of_memory_is_told_with_what_to_do(front_end: FrontEnd, tmp_path: Path) -> None:
    """The system refuses one worker the memory for a large video."""
    panel, server = Panel(front_end), front_end.server
    front_end.load_graph(sampling_graph(fresh(Setting()), Swapped()))
    assert front_end.run(timeout=120)["status"]["status_str"] == "success"
    workers = server.workers()
    limit_memory(workers[-1].pid, spare=32 << 20)
    front_end.load_graph(sampling_graph(fresh(Setting(width=512, height=512, length=33)), Swapped()))
    assert front_end.run(timeout=120)["status"]["status_str"] == "error"

    reason = r"worker rank \d \(cpu, pid \d+\) failed in '\w+'.*Use a smaller size or fewer frames"
    panel.wait_for_toast("Out of memory in a worker")
    panel.wait_for_toast(reason)
    assert front_end.page.locator(".workflow-tabs-container").get_by_text("Workers failed").count() == 1
    shown = panel.wait_for(reason)
    assert re.search(r"Rank \d · cpu\s+Failed", shown), shown
    heights = panel.root.locator(".sp-failure").evaluate("(e) => [e.scrollHeight, e.clientHeight]")
    assert heights[0] <= heights[1], "the advice, at the end, is cut off"
    panel.page.screenshot(path=tmp_path / "out-of-memory.png")
    details = front_end.error_details()
    front_end.page.screenshot(path=tmp_path / "dialog.png")
    assert re.search(reason, details), details
    assert "ran out of memory" in details, "ComfyUI does not take it for what it is"

    front_end.load_graph(sampling_graph(fresh(Setting()), Swapped()))
    assert front_end.run(timeout=120)["status"]["status_str"] == "success"
    assert not {worker.pid for worker in workers} & {worker.pid for worker in server.workers()}
    assert front_end.page.locator(".workflow-tabs-container").get_by_text("Workers failed").count() == 0
    assert front_end.own_errors() == []


def test_what_does_not_run_in_parallel_is_told_once(front_end: FrontEnd, tmp_path: Path) -> None:
    """Sampler (SP) with a sampler that decides by its results how to go on; and the same once more."""
    setting = Setting(chain="sp_sampler", sampler="dpm_adaptive")
    panel = Panel(front_end)
    reason = r"Sampler \(SP\): sampled step by step, as by KSampler: "
    front_end.load_graph(sampling_graph(fresh(setting), Swapped()))
    assert front_end.run(timeout=120)["status"]["status_str"] == "success"
    panel.wait_for_toast("Not run in parallel")
    panel.wait_for_toast(reason)
    assert re.search(r"Sampler \(SP\): sampled step by step, as by KSampler, in \d+\.\d s: ", front_end.node_texts())
    panel.page.screenshot(path=tmp_path / "fallback.png")
    panel.toasts(reason).first.wait_for(state="hidden", timeout=30_000)
    front_end.load_graph(sampling_graph(fresh(setting), Swapped()))
    assert front_end.run(timeout=120)["status"]["status_str"] == "success"
    front_end.settle()
    assert panel.toasts(reason).count() == 0
    assert front_end.page.locator(".workflow-tabs-container").get_by_text("Workers failed").count() == 0
    assert front_end.own_errors() == []


def test_a_changed_setting_takes_effect(front_end: FrontEnd, tmp_path: Path) -> None:
    """The default devices, set in the dialog, for a graph without SP Config; ComfyUI's cache must not keep the old."""
    setting = fresh(Setting())
    builder = GraphBuilder()
    model = builder.add("SPLoadDiffusionModel", unet_name=setting.checkpoint, weight_dtype="default")
    add_sampling(builder, setting, model)
    panel = Panel(front_end)
    front_end.load_graph(builder.graph)
    page = front_end.page
    page.evaluate("window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Sequence Parallel", exact=True).first.click()
    field = dialog.get_by_role("textbox", name="Default devices")
    page.screenshot(path=tmp_path / "settings.png")
    try:
        field.fill("cpu,cpu,cpu")
        field.press("Tab")
        page.keyboard.press("Escape")
        assert front_end.run(timeout=180)["status"]["status_str"] == "success"
        panel.wait_for("^Rank 2 · cpu$")
    finally:
        page.evaluate("window.app.extensionManager.setting.set('SequenceParallel.Workers.Devices', 'auto')")
    assert front_end.own_errors() == []


def test_eight_workers_fit_and_a_hidden_panel_asks_for_nothing(front_end: FrontEnd, tmp_path: Path) -> None:
    requests, page = front_end.requests, front_end.page
    page.clock.install()
    front_end.settle()
    assert not [url for url in requests if "sequence_parallel" in url], "asked before the panel was opened"

    page.route("**/sequence_parallel/watch", lambda route: route.fulfill(json=eight_workers()))
    panel = Panel(front_end)
    panel.wait_for("Rank 7 · cuda:7")
    for palette in ("dark", "light"):
        page.evaluate("(name) => window.app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
        front_end.settle()
        page.screenshot(path=tmp_path / f"eight-{palette}.png")
        sizes = panel.root.evaluate("(e) => [e.scrollWidth, e.clientWidth, e.scrollHeight, e.clientHeight]")
        assert sizes[0] <= sizes[1] and sizes[2] <= sizes[3], f"something sticks out: {sizes}"
    page.evaluate("window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    for part in (
        "6.31× one device",
        "7 of 21 passes skipped",
        "Step 11 of 30 · 3.42 s per step",
        "2.3 GiB in 120",
        "320 ms per step (9 %)",
    ):
        assert part in panel.root.inner_text(), panel.root.inner_text()
    exposed = panel.root.get_by_text("320 ms per step (9 %)").get_attribute("title") or ""
    assert "Rank 0 40 ms" in exposed and "Rank 7 320 ms" in exposed and "not part of it: 50 ms" in exposed, exposed
    buttons = panel.root.get_by_role("button").all()
    of_workers, of_workflow = ["Free memory", "Restart workers", "Copy report"], ["Use all GPUs", "Use one GPU again"]
    assert [button.inner_text() for button in buttons] == of_workers + of_workflow
    buttons[0].focus()
    page.keyboard.press("Tab")
    assert buttons[1].evaluate("(button) => button === document.activeElement"), "not to be reached with the keyboard"

    hidden_again(panel, requests, lambda: panel.close())
    panel.open()
    hidden_again(panel, requests, lambda: page.get_by_role("button", name=re.compile("^Workflows")).first.click())
    assert front_end.own_errors() == []


def hidden_again(panel: Panel, requests: list[str], hide: Any) -> None:
    """A visible panel asks again and again. Hiding it is said once; then nothing is asked, for a minute."""

    def asked() -> list[str]:
        panel.front_end.settle()
        return [url for url in requests if "sequence_parallel" in url]

    asked()
    requests.clear()
    panel.page.clock.fast_forward(60_000)
    assert asked()
    requests.clear()
    hide()
    assert len(asked()) == 1
    panel.page.clock.fast_forward(60_000)
    assert len(asked()) == 1, requests


def eight_workers() -> dict[str, Any]:
    gib = 2**30
    ranks = [
        {
            "rank": rank,
            "pid": 4000 + rank,
            "state": "waiting" if rank == 3 else "step",
            "progress": None,
            "device": f"cuda:{rank}",
            "title": "NVIDIA GeForce RTX 4090",
            "weights": int(12.8 * gib),
            "memory": int((17.1 + 0.2 * rank) * gib),
            "free": int((6 - 0.4 * rank) * gib),
            "total": 24 * gib,
            "seconds": 3.4 - 0.03 * rank,
            "exposed_s": 0.04 * (rank + 1),
        }
        for rank in range(8)
    ]
    group = {
        "id": 1,
        "devices": ",".join(rank["device"] for rank in ranks),
        "chosen": "auto: 8 visible GPUs",
        "state": "step",
        "failure": None,
        "ranks": ranks,
        "start": {"python": 0.05, "torch": 2.1, "device": 0.6, "meeting": 1.3},
        "load": {"libraries": 1.2, "weights": 9.8},
        "models": ["hunyuan_video_t2v_720p_bf16.safetensors"],
        "plan": {
            "ulysses": 4,
            "ring": 1,
            "cfg": 2,
            "dp": 1,
            "reason": "auto: positive and negative prompt side by side",
        },
        "step": {
            "seconds": 3.4,
            "collectives": 120,
            "bytes_sent": int(2.31 * gib),
            "exposed_s": 0.32,
            "copying_s": 0.05,
        },
        "cache": {"name": "TeaCache (SP)", "hits": 7, "passes": 21, "seconds": 40.0, "seconds_saved": 18.2},
        "speedup": 6.31,
        "sampling": {"step": 11, "steps": 30, "running": True, "seconds_per_step": 3.42},
    }
    return {"groups": [group]}
