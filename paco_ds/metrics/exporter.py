"""Prometheus metrics of a rank.

Counters belong to this process and start at 0 (restoring them would break `rate()`); the job's position is in gauges.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.metrics.server import MetricsServer
from paco_ds.metrics.steps import StepRecord

logger = logging.getLogger(__name__)

PORT_TRIES = 64
STATES = ("starting", "training", "evaluating", "saving", "finished", "failed")
STATE_OF_PHASE = {
    "start": "starting",
    "images": "training",
    "training": "training",
    "evaluation": "evaluating",
    "save": "saving",
    "report": "evaluating",
}
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


disable_created_metrics()  # a second series for each counter, which no expression needs


class Exporter:
    """The metrics of a rank in their own registry, and the server that shows them.

    Args:
        first: whether this is rank 0, which alone shows figures of the job as a whole.
        phase: what this rank does, a key of `STATE_OF_PHASE`; asked at each scrape.
        device: of this rank, whose memory is shown where it is a GPU.
    """

    def __init__(
        self, first: bool = True, phase: Callable[[], str] = lambda: "start", device: torch.device | None = None
    ) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self._phase, self._ended, self._total_steps = phase, "", 0
        self._first_step: tuple[int, float] | None = None
        self._server: MetricsServer | None = None
        self._add_steps_and_images()
        self._add_loss()
        self._add_job(registry if first else None)
        states = Gauge("paco_run_state", "1 for the state that this rank is in.", ["state"], registry=registry)
        for state in STATES:
            states.labels(state).set_function(partial(self._is_in, state))
        if device is not None and device.type == "cuda":
            self._show_memory(device)
        self._build = Info("paco_build", "Versions, method and world size.", registry=registry)

    def _add_steps_and_images(self) -> None:
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        self._samples = counter("paco_samples", "Training images processed by this rank.")
        self._steps = counter("paco_steps", "Optimizer steps, skipped ones included.")
        self._skipped = counter(
            "paco_skipped_steps",
            "Optimizer steps that were skipped: a value was not finite, or the gradient norm far off.",
        )
        self._duration = Histogram(
            "paco_step_duration_seconds",
            "Wall time of an optimizer step, waiting for data included.",
            registry=self.registry,
            buckets=STEP_BUCKETS,
        )
        self._data_wait = counter("paco_data_wait_seconds", "Time spent waiting for images.")
        self._bad_samples = counter("paco_bad_samples", "Bad samples that were replaced.", ["reason"])
        self._collective = counter("paco_collective_bytes", "Bytes this rank sent in collectives of paco_ds.", ["op"])
        self._checkpoint = counter("paco_checkpoint_blocked_seconds", "Time for which checkpoints blocked training.")
        self._step = gauge("paco_step", "Optimizer steps of the job so far, including earlier runs.")
        self._epoch = gauge("paco_epoch", "Current epoch, counted from 0.")
        self._last_step = gauge(
            "paco_last_step_timestamp_seconds",
            "Unix time at which the last step ended; before the first, that of the start.",
        )
        self._last_step.set_to_current_time()  # not 0: an alert would take the first step for 50 years late

    def _add_loss(self) -> None:
        gauge = partial(Gauge, registry=self.registry)
        self._loss = gauge("paco_loss", "Training loss of the last step.")
        self._loss_parts = gauge(
            "paco_loss_part",
            "Parts of the training loss of the last step, by name, for methods with several parts.",
            ["part"],
        )
        self._lr = gauge("paco_learning_rate", "Learning rate of the last step.")
        self._queue_fill = gauge("paco_queue_fill_ratio", "Filled share of the key queue.")
        self._grad_norm_ratio = gauge("paco_grad_norm_ratio", "The gradient norm over its usual value in recent steps.")
        self._grad_norm = gauge("paco_grad_norm", "L2 norm of the last step's gradient before clipping.")
        self._center_probability = gauge(
            "paco_center_probability",
            "Probability of the label's center, by shot, in the last step with such an anchor.",
            ["shot"],
        )
        self._center_optimum = gauge(
            "paco_center_probability_optimum",
            "Probability of the label's center at the loss's optimum, by shot.",
            ["shot"],
        )
        self._positive_probability = gauge(
            "paco_positive_probability",
            "Probability of each positive (geometric mean), by shot, in the last step with such an anchor.",
            ["shot"],
        )
        self._positive_optimum = gauge(
            "paco_positive_probability_optimum",
            "Probability of each positive at the loss's optimum, by shot.",
            ["shot"],
        )

    def _add_job(self, registry: CollectorRegistry | None) -> None:
        """Figures of the job as a whole; without a registry they are kept and not shown."""
        gauge = partial(Gauge, registry=registry)
        self._accuracy = gauge(
            "paco_shot_accuracy_ratio",
            "Top-1 accuracy of the last evaluation of a split, by shot.",
            ["split", "shot"],
        )
        self._experts = gauge(
            "paco_images_by_experts_ratio",
            "Share of the images of the last evaluation that routers sent to this many experts.",
            ["split", "experts"],
        )
        self._restarts = Counter("paco_restarts", "Restarts of the run, before this process too.", registry=registry)
        self._images = gauge("paco_images_per_second", "Images per second of all ranks, last step.")
        self._total = gauge("paco_total_steps", "Optimizer steps of the whole run.")
        self._left = gauge("paco_seconds_left", "Estimated seconds of training steps that are left.")
        self._saved = gauge("paco_checkpoint_timestamp_seconds", "Unix time of the newest checkpoint; 0: none.")
        self._saved_bytes = gauge("paco_checkpoint_bytes", "Size of the newest checkpoint.")
        self._free_bytes = gauge("paco_run_free_bytes", "Free space of the run directory at the last save.")

    @property
    def state(self) -> str:
        """One of `STATES`."""
        return self._ended or STATE_OF_PHASE[self._phase()]

    def _is_in(self, state: str) -> float:
        return float(self.state == state)

    @property
    def finished(self) -> bool:
        """Whether the run has ended as `finished`."""
        return self._ended == "finished"

    def _show_memory(self, device: torch.device) -> None:
        memory = Gauge("paco_gpu_memory_bytes", "Memory of this rank's GPU.", ["kind"], registry=self.registry)
        memory.labels("allocated").set_function(lambda: torch.cuda.memory_allocated(device))
        memory.labels("reserved").set_function(lambda: torch.cuda.memory_reserved(device))
        memory.labels("peak").set_function(lambda: torch.cuda.max_memory_allocated(device))
        memory.labels("total").set(torch.cuda.get_device_properties(device).total_memory)

    def start(self, base_port: int, local_rank: int, address: str | None = None) -> int | None:
        """Serve /metrics on `base_port` + `local_rank` or the next free port; base_port 0 takes any free one.

        Returns the port, or None after a warning: a missing port never stops a run.
        """
        first = base_port + local_rank if base_port else 0
        for port in range(first, min(first + PORT_TRIES, 65536)):
            try:
                self._server = MetricsServer(port, self.registry, address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                logger.warning("no /metrics: port %d cannot be served (%s); training continues", port, error)
                return None
            if port != first and first:
                logger.warning("port %d is taken; /metrics is served on port %d", first, self._server.port)
            return self._server.port
        logger.warning(
            "no /metrics: no free port in %d..%d; training continues. Set metrics.port to another port",
            first,
            first + PORT_TRIES - 1,
        )
        return None

    def publish_targets(self, text: str) -> None:
        """Serve the list of targets under /targets."""
        if self._server is not None:
            self._server.targets = text.encode()

    def planned(self, total_steps: int) -> None:
        """Set the steps of the whole run."""
        self._total_steps = total_steps
        self._total.set(total_steps)

    def ended(self, state: str) -> None:
        """The state from now on: `finished` or `failed`."""
        self._ended = state

    def build_info(self, labels: Mapping[str, str]) -> None:
        """Set paco_build_info to 1 with these labels."""
        self._build.info(dict(labels))

    def observe_step(self, record: StepRecord, samples: int) -> None:
        """Count a step of `samples` images on this rank and set its gauges."""
        self._samples.inc(samples)
        self._steps.inc()
        self._skipped.inc(record.skipped)
        self._duration.observe(record.step_seconds)
        self._data_wait.inc(record.data_wait_seconds)
        self._loss.set(record.loss)
        for part, value in record.parts.items():
            self._loss_parts.labels(part).set(value)
        self._lr.set(record.lr)
        self._grad_norm.set(record.grad_norm)
        if record.grad_norm_ratio is not None:
            self._grad_norm_ratio.set(record.grad_norm_ratio)
        self._queue_fill.set(record.queue_fill)
        self._step.set(record.step)
        self._epoch.set(record.epoch)
        self._last_step.set_to_current_time()
        self._images.set(record.images_per_second)
        # the first step is left out: it compiles, and waits for the first images
        if self._first_step is None:
            self._first_step = (record.step, time.monotonic())
        done, since = record.step - self._first_step[0], time.monotonic() - self._first_step[1]
        a_step = since / done if done else record.step_seconds
        self._left.set(a_step * max(0, self._total_steps - record.step))
        _set_by_shot(self._center_probability, record.center_probability)
        _set_by_shot(self._center_optimum, record.center_probability_optimum)
        _set_by_shot(self._positive_probability, record.positive_probability)
        _set_by_shot(self._positive_optimum, record.positive_probability_optimum)

    def observe_bad_sample(self, reason: str) -> None:
        """Count a replaced image."""
        self._bad_samples.labels(reason).inc()

    def observe_accuracy(self, accuracy: ShotAccuracy, split: str) -> None:
        """Set the accuracies of an evaluation, and with routers the shares of images by number of experts."""
        for shot, value in accuracy.top1().items():
            if value is not None:
                self._accuracy.labels(split, shot).set(value)
        images_by_experts = accuracy.images_by_experts or ()
        for experts, images in enumerate(images_by_experts, 1):
            self._experts.labels(split, experts).set(images / max(1, sum(images_by_experts)))

    def add_collective_bytes(self, op: str, count: int) -> None:
        """Count bytes of a collective."""
        self._collective.labels(op).inc(count)

    def checkpoint_blocked(self, seconds: float) -> None:
        """Count time lost to a checkpoint."""
        self._checkpoint.inc(seconds)

    def checkpoint_saved(self, time: float, size: int, free: int) -> None:
        """Set the age and size of the newest checkpoint, and the free space beside it."""
        self._saved.set(time)
        self._saved_bytes.set(size)
        self._free_bytes.set(free)

    def restarted(self, times: int) -> None:
        """Count the starts of the whole run: this process is the last of them."""
        self._restarts.inc(times)

    def close(self) -> None:
        """Stop the server and its thread, and release the port."""
        if self._server is not None:
            self._server.close()
            self._server = None


def reachable_host(master_addr: str) -> str:
    """The local address from which the master is reached (127.0.0.1 if the master is this machine).

    All hosts share that network; Prometheus may not resolve a host name. An IPv6 address is in brackets, so that
    f"{host}:{port}" is valid. If the master cannot be resolved: this machine's host name, with a warning.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(master_addr, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket sends nothing here; the kernel only chooses the route
            host = str(probe.getsockname()[0])
    except OSError as error:
        logger.warning("no route to master %r (%s); metrics targets name this host instead", master_addr, error)
        return socket.gethostname()
    return f"[{host}]" if family == socket.AF_INET6 else host


def _set_by_shot(gauge: Gauge, figures: Mapping[str, float | None]) -> None:
    # a shot without an anchor in this step keeps its last value
    for shot, value in figures.items():
        if value is not None:
            gauge.labels(shot).set(value)
