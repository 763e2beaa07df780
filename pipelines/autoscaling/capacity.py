"""How large a fleet a load needs: replicas, nodes, partitions and GPU-hours, computed before anything is rented.

A replica's rate is computed from published figures of the card and from counted tokens, unless a measured one is given.
Reading the prompt takes 2 operations for each weight and token, as if all tokens went through all weights; writing the
answer reads all weights once for each token, for as many answers as are in flight at a time. Of both the card gives the
share of its published figure that engines are known to reach. None of this has been measured here.
"""

import math
from dataclasses import asdict, dataclass
from typing import Final, Literal

from pipelines.autoscaling.decision import INTAKE_OVERSUBSCRIPTION, Rules
from pipelines.autoscaling.simulation.cluster import ClusterSpec
from pipelines.autoscaling.simulation.day import simulate_day
from pipelines.autoscaling.simulation.load import LoadProfile, draw_arrivals
from pipelines.autoscaling.simulation.scalers import SluiceScaler
from services.core.errors import ConfigurationError
from services.guard.checkpoints import GIB, Checkpoint, resolve

ImageSize = Literal["small", "medium", "large"]

COMPUTE_SHARE: Final = 0.40
"""Of the published dense bf16 operations, while prompts are read."""
MEMORY_SHARE: Final = 0.60
"""Of the published memory bandwidth, while answers are written."""
TENSOR_PARALLEL_SHARE: Final = 0.85
"""What is left of that when a replica is spread over several GPUs."""

PROMPT_TOKENS: Final = 1129
"""LlavaGuard's default policy."""
ANSWER_TOKENS: Final = 23.5
"""20 for Safe, 90 with a rationale for the 5 % that are Unsafe."""
_PARTITIONS_PER_MEMBER: Final = 2
_MIN_PARTITIONS: Final = 6
_SECONDS_PER_UNIT: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "day": 86_400}

IMAGE_TOKENS: Final[dict[str, dict[ImageSize, int]]] = {
    "LlavaQwenForCausalLM": {"small": 1485, "medium": 4725, "large": 7269},  # anyres, tiles of 384 px
    "LlavaLlamaForCausalLM": {"small": 576, "medium": 576, "large": 576},  # one view of 336 px
    "Qwen2_5_VLForConditionalGeneration": {"small": 196, "medium": 999, "large": 1280},  # 28 px a token, 1280 at most
    "ShieldGemma2ForImageClassification": {"small": 256, "medium": 256, "large": 256},
}
"""Tokens of an image, by architecture: up to 384 x 384 px, 1024 x 768, 1920 x 1080."""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """A GPU as its vendor describes it."""

    bf16_tflops: float
    """Dense; fp16 where it has no bf16."""
    memory_gib: float
    """As the driver reports it."""
    bandwidth_gb_per_s: float


GPU_SPECS: Final = {
    "t4": GpuSpec(65, 15.0, 320),
    "l4": GpuSpec(121, 22.5, 300),
    "a10g": GpuSpec(70, 22.5, 600),
    "l40s": GpuSpec(362, 45.0, 864),
    "a100-40gb": GpuSpec(312, 40.0, 1555),
    "a100-80gb": GpuSpec(312, 80.0, 2039),
    "h100": GpuSpec(989, 79.6, 3350),
    "h200": GpuSpec(989, 140.4, 4800),
}
"""From NVIDIA's data sheets, without sparsity."""


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """A fleet for a constant load. Rates in submissions a second."""

    checkpoint: str
    gpu: str
    rate: float
    objective_s: float
    replica_rate: float
    source: str
    """Whether the replica's rate was computed, and of what, or given."""
    replicas: int
    gpus_per_replica: int
    nodes: int
    intake_members: int
    partitions: int
    gpu_hours_per_million: float
    notes: tuple[str, ...] = ()
    day: dict[str, float] | None = None
    """The same mean load as a simulated day with spikes, where one was asked for."""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The figures for people."""
        rows = {
            "replicas": f"{self.replicas} of {self.gpus_per_replica} {self.gpu}, {self.replica_rate:.2f}/s each",
            "nodes": self.nodes,
            "intake members": self.intake_members,
            "partitions": f"{self.partitions} at least",
            "GPU-hours a million": f"{self.gpu_hours_per_million:.1f}",
        }
        if self.day:
            rows["a day with spikes"] = (
                f"p50 {self.day['p50_s']:.0f} s, p95 {self.day['p95_s']:.0f} s, p99 {self.day['p99_s']:.0f} s; "
                f"{self.day['fewest_replicas']:.0f} to {self.day['most_replicas']:.0f} replicas, "
                f"{self.day['gpu_hours_per_million']:.1f} GPU-hours a million (simulated)"
            )
        return [f"{name:<20} {value}" for name, value in rows.items()]


def plan_capacity(
    *,
    rate: float,
    objective_s: float,
    checkpoint: str,
    gpu: str,
    image: ImageSize = "medium",
    replica_rate: float | None = None,
    gpus_per_node: int | None = None,
    day: bool = False,
    rules: Rules = Rules(),  # noqa: B008 - immutable
) -> CapacityPlan:
    """The fleet that keeps `objective_s` at a constant `rate`.

    Raises:
        ConfigurationError: a name is unknown, or eight of these cards do not hold the checkpoint.
    """
    model, spec = resolve(checkpoint), _find_gpu_spec(gpu)
    spread = model.tensor_parallel_size([round(spec.memory_gib * GIB)] * 8)
    if not spread:
        raise ConfigurationError(
            f"{model.name} needs {model.gpu_memory_bytes / GIB:.0f} GiB, and eight {gpu} have less; "
            "choose a GPU with more memory"
        )
    source = "given"
    if replica_rate is None:
        replica_rate = compute_replica_rate(model, spec, spread, image, rules.guard_in_flight)
        source = (
            f"computed, not measured: {model.parameters / 1e9:g} billion weights, "
            f"{_count_tokens(model, image)} tokens read and {ANSWER_TOKENS:g} written, "
            f"{COMPUTE_SHARE:.0%} of {spec.bf16_tflops:g} TFLOPS and {MEMORY_SHARE:.0%} of "
            f"{spec.bandwidth_gb_per_s:g} GB/s"
            + (f", {TENSOR_PARALLEL_SHARE:.0%} of both over {spread} GPUs" * (spread > 1))
        )
    replicas = max(1, math.ceil(round(rate / (1 - rules.headroom) / replica_rate, 6)))
    members = max(1, math.ceil(INTAKE_OVERSUBSCRIPTION * replicas * rules.guard_in_flight / rules.intake_in_flight))
    notes = []
    if objective_s < rules.start_s:
        notes.append(
            f"an objective shorter than the start of a GPU replica ({rules.start_s:g} s) is lost at every sudden rise "
            "beyond the replicas that run: set SLUICE_GUARD_MIN_REPLICAS to what the highest rate needs"
        )
    return CapacityPlan(
        checkpoint=model.name,
        gpu=gpu.lower(),
        rate=rate,
        objective_s=objective_s,
        replica_rate=replica_rate,
        source=source,
        replicas=replicas,
        gpus_per_replica=spread,
        nodes=math.ceil(replicas / max(1, (gpus_per_node or spread) // spread)),
        intake_members=members,
        partitions=max(_MIN_PARTITIONS, _PARTITIONS_PER_MEMBER * members),
        gpu_hours_per_million=replicas * spread / rate * 1e6 / 3600,
        notes=tuple(notes),
        day=_simulate_day(rate, objective_s, replica_rate, spread, rules) if day else None,
    )


def compute_replica_rate(model: Checkpoint, spec: GpuSpec, gpus: int, image: ImageSize, in_flight: int) -> float:
    """Submissions a second of one replica: see the module's own words."""
    share = TENSOR_PARALLEL_SHARE if gpus > 1 else 1.0
    operations = 2.0 * model.parameters * _count_tokens(model, image)
    reading_s = operations / (COMPUTE_SHARE * share * gpus * spec.bf16_tflops * 1e12)
    weights_bytes = 2.0 * model.parameters
    step_s = weights_bytes / (MEMORY_SHARE * share * gpus * spec.bandwidth_gb_per_s * 1e9)
    return 1 / (reading_s + ANSWER_TOKENS * step_s / in_flight)


def parse_rate(text: str) -> float:
    """Submissions a second of `400/s`, `24000/min`, `1e6/h`, `10000000/day`; a bare number is a second's.

    Raises:
        ConfigurationError: it is none of these.
    """
    number, _, unit = text.partition("/")
    return _parse_positive(number, text, "a rate such as 400/s or 1000000/h") / _parse_time_unit(unit or "s", text)


def _parse_positive(number: str, text: str, what: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigurationError(f"{text!r} is not {what}")
    return value


def _parse_time_unit(unit: str, text: str) -> int:
    if unit not in _SECONDS_PER_UNIT:
        raise ConfigurationError(f"{text!r} has no unit of time; use one of {', '.join(_SECONDS_PER_UNIT)}")
    return _SECONDS_PER_UNIT[unit]


def _find_gpu_spec(gpu: str) -> GpuSpec:
    if gpu.lower() not in GPU_SPECS:
        raise ConfigurationError(
            f"--gpu {gpu} is unknown; give one of {', '.join(GPU_SPECS)}, the nearest one, and --replica-rate"
        )
    return GPU_SPECS[gpu.lower()]


def _count_tokens(model: Checkpoint, image: ImageSize) -> int:
    return PROMPT_TOKENS + IMAGE_TOKENS[model.architecture][image]


def _simulate_day(rate: float, objective_s: float, replica_rate: float, gpus: int, rules: Rules) -> dict[str, float]:
    most = 10 * math.ceil(rate / replica_rate)
    cluster = ClusterSpec(
        replica_rate=replica_rate,
        guard_in_flight=rules.guard_in_flight,
        intake_in_flight=rules.intake_in_flight,
        max_replicas=max(20, most),
    )
    told = Rules(objective_s=objective_s, replica_rate=replica_rate)
    simulated = simulate_day(draw_arrivals(LoadProfile(mean_rate=rate), 1), SluiceScaler(told, cluster), cluster, 1)
    return {
        "p50_s": simulated.percentile_s(0.5),
        "p95_s": simulated.percentile_s(0.95),
        "p99_s": simulated.percentile_s(0.99),
        "minutes_within_objective": float((simulated.p99_by_minute_s() <= objective_s).mean()),
        "gpu_hours": simulated.gpu_hours * gpus,
        "gpu_hours_per_million": simulated.gpu_hours * gpus / float(simulated.arrived.sum()) * 1e6,
        "fewest_replicas": float(simulated.replicas.min()),
        "most_replicas": float(simulated.replicas.max()),
    }
