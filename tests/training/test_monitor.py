"""Logs survive restarts, rates leave out pauses, and a bad number stops the run."""

import json
import signal
import time

import jax.numpy as jnp
import pytest

from usfmae_jax.training import monitor as monitors
from usfmae_jax.training import writers


def _monitor(path, first_step=0, **options):
    defaults = {"total_steps": 10, "batch_size": 4, "every": 1, "flops_per_image": 1e6}
    return monitors.Monitor(str(path), first_step=first_step, **(defaults | options))


def _metrics(loss=1.0, norm=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm), "learning_rate": jnp.float32(0.1)}


def _lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_logged_once_the_next_is_dispatched(tmp_path):
    with _monitor(tmp_path) as report:
        report.update(1, _metrics(3.0))
        assert _lines(tmp_path) == []
        report.update(2, _metrics(2.0))
        assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [(1, 3.0)]
        assert report.flush()["loss"] == 2.0
        assert report.flush() == {}
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]


def test_a_resumed_log_drops_what_the_checkpoint_does_not_know(tmp_path):
    with _monitor(tmp_path) as report:
        for step in range(1, 6):
            report.update(step, _metrics(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    with _monitor(tmp_path, first_step=3) as report:
        assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]
        report.update(4, _metrics(9.0))
        report.flush()
    assert _lines(tmp_path)[-1]["loss"] == 9.0


@pytest.mark.parametrize(
    "damaged",
    [b"5", b"[" * 100_000, b"\0" * 200, b'{"step": 1, "los\xf3": 1.0}', b'{"step": "1", "loss": 1.0}', b'{"loss": 1.0}',
     b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": null}', b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
     b'{"step": true}', b'{"step": 1, "loss": 1e400, "images_per_second": 1, "input_wait": 0}',
     b'{"step": 1, "loss": 1.0}', b'{"step": 1, "lgss": 1.0, "images_per_second": 4}'],
    ids=lambda line: line[:40],
)  # fmt: skip
def test_a_line_that_is_no_record_of_numbers_is_passed_over_in_log_and_page(tmp_path, damaged):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "validation/auroc": NaN}\n' + damaged + b"\n")
    with _monitor(tmp_path, first_step=1, page=True) as report:
        assert _lines(tmp_path)[0]["step"] == 1
        report.update(2, _metrics(9.0))
        report.flush()
    assert _lines(tmp_path)[-1]["loss"] == 9.0
    assert "9.0000" in (tmp_path / "index.html").read_text()
    with _monitor(tmp_path, first_step=1, page=True):  # nothing is left to do
        pass


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"loss": float("inf")}, {"norm": float("nan")}])
def test_a_number_that_is_none_stops_and_names_the_step(tmp_path, bad):
    with _monitor(tmp_path) as report:
        report.update(1, _metrics())
        report.update(2, _metrics(**bad))
        with pytest.raises(monitors.DivergedError, match="at step 2"):
            report.update(3, _metrics())


def test_rates_leave_out_pauses_and_count_waiting(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(monitors.time, "perf_counter", lambda: clock[0])
    with _monitor(tmp_path, every=2) as report:
        report.update(1, _metrics())
        report.flush()  # step 1 is always logged, and starts the window anew
        with report.waiting_for_input():
            clock[0] += 1.0
        clock[0] += 3.0
        with report.pause():
            clock[0] += 100.0
        report.update(2, _metrics())
        report.flush()
    line = _lines(tmp_path)[-1]
    assert line["images_per_second"] == pytest.approx(1.0)  # 4 images in 4 seconds
    assert line["images_per_second_per_device"] == pytest.approx(1 / 8)
    assert line["input_wait"] == pytest.approx(0.25)
    assert "mfu" not in line  # a CPU's peak is not known


def test_a_clock_that_is_set_back_stops_no_bar_and_event_files_stay_in_order(tmp_path, monkeypatch):
    wall = [2e9]

    def earlier():
        wall[0] -= 3600
        return wall[0]

    monkeypatch.setattr(monitors.time, "time", earlier)
    monkeypatch.setattr(monitors.time, "time_ns", lambda: int(earlier() * 1e9))
    monkeypatch.setattr("tqdm.std.time", earlier)
    names: list[str] = []
    for first_step in (0, 1, 2):
        log = {"tensorboard": True, "wandb": "", "mlflow": ""}
        places = writers.open_writers(log, str(tmp_path), first_step, {})
        with _monitor(tmp_path, first_step=first_step, writers=places) as report:
            report._bar.mininterval = 0.0
            for step in (first_step + 1, first_step + 2):
                report.update(step, _metrics())
            report.flush()
            assert 0 <= report._bar.format_dict["elapsed"] < 60
            assert report._bar.last_print_n > first_step
        names += [path.name for path in (tmp_path / "tensorboard").iterdir() if path.name not in names]
    assert len(names) == 3
    assert names == sorted(names)
    assert all(line["images_per_second"] > 0 for line in _lines(tmp_path))


def test_mfu_is_achieved_over_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(monitors, "peak_flops", lambda device: 1e6)
    clock = [0.0]
    monkeypatch.setattr(monitors.time, "perf_counter", lambda: clock[0])
    with _monitor(tmp_path, flops_per_image=2e5) as report:
        clock[0] += 1.0
        report.update(1, _metrics())
        report.flush()
    assert _lines(tmp_path)[-1]["mfu"] == pytest.approx(4 / 8 * 2e5 / 1e6)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("cpu", None),
    ],
)
def test_peaks_of_known_devices(kind, peak):
    class Device:
        device_kind = kind

    assert monitors.peak_flops(Device()) == peak


def test_the_mean_loss_restarts_with_every_save(tmp_path):
    with _monitor(tmp_path) as report:
        for step, loss in ((1, 4.0), (2, 2.0)):
            report.update(step, _metrics(loss))
        report.flush()
        assert report.mean_loss_since_save() == 3.0
        report.update(3, _metrics(7.0))
        report.flush()
        assert report.mean_loss_since_save() == 7.0


def test_ctrl_c_in_a_job_of_several_processes_counts_as_sigterm_which_jax_hands_on(monkeypatch):
    monkeypatch.setattr(monitors.jax, "process_count", lambda: 2)
    terminated, before = [], signal.getsignal(signal.SIGINT)
    handler = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    try:
        with monitors.Preemption():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            assert terminated
            assert signal.getsignal(signal.SIGINT) == before  # a second one does what it always did
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_sigterm_is_noticed_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with monitors.Preemption() as preemption:
        assert not preemption.requested()
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.01)
        assert preemption.requested()
        assert signal.getsignal(signal.SIGTERM) == before  # a second one does what it always did
    assert signal.getsignal(signal.SIGTERM) == before
