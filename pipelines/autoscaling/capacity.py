"""How large a fleet a load needs: replicas, nodes, partitions and GPU-hours, computed before anything is rented.

Without a measured rate, the rate of a replica is computed from the vendor's figures of the GPU and from counted tokens.
Reading a prompt takes 2 operations for each weight and token, as if all tokens went through all weights. Writing an
answer reads all weights once for each token, for all answers in flight together. The GPU reaches a share of the
vendor's figures, which is known of other engines. None of this has been measured here.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

from pipelines.autoscaling.replica_decision import INTAKE_OVERSUBSCRIPTION, Rules
from pipelines.autoscaling.simulation.cluster import ClusterSpec
from pipelines.autoscaling.simulation.day import simulate_day
from pipelines.autoscaling.simulation.load import LoadProfile, draw_arrivals
from pipelines.autoscaling.simulation.scalers import SluiceScaler
from services.core.errors import ConfigurationError
from services.guard.checkpoints import Checkpoint, resolve_checkpoint
from services.guard.gpu_memory import GIB

ImageSize = Literal["small", "medium", "large"]

COMPUTE_SHARE: Final = 0.40
"""Share of the vendor's dense bf16 operations that the engine reaches while it reads prompts: the model FLOPs
utilization (MFU)."""
MEMORY_SHARE: Final = 0.60
"""Share of the vendor's memory bandwidth that the engine reaches while it writes answers: the memory bandwidth
utilization (MBU)."""
TENSOR_PARALLEL_SHARE: Final = 0.85
"""Share of both that remains if a replica is spread over several GPUs."""

PROMPT_TOKENS: Final = 1129
"""Tokens of LlavaGuard's default policy. For policies of another length, measure the rate and give --replica-rate."""
ANSWER_TOKENS: Final = 23.5
"""Mean tokens of an answer: 20 for Safe, 90 with a rationale for the 5 % that are Unsafe."""
_PARTITIONS_PER_MEMBER: Final = 2
_MIN_PARTITIONS: Final = 6

IMAGE_TOKENS_BY_ARCHITECTURE: Final[dict[str, dict[ImageSize, int]]] = {
    "LlavaQwenForCausalLM": {"small": 1485, "medium": 4725, "large": 7269},  # anyres, tiles of 384 px
    "LlavaOnevisionForConditionalGeneration": {"small": 1485, "medium": 4725, "large": 7269},
    "LlavaLlamaForCausalLM": {"small": 576, "medium": 576, "large": 576},  # one view of 336 px
    "Qwen2_5_VLForConditionalGeneration": {"small": 196, "medium": 999, "large": 1280},  # 28 px a token, 1280 at most
    "ShieldGemma2ForImageClassification": {"small": 256, "medium": 256, "large": 256},
}
"""Tokens of an image by architecture and size: up to 384 x 384 px, 1024 x 768 px, 1920 x 1080 px."""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """The vendor's figures of a GPU."""

    bf16_tflops: float
    """Dense operations."""
    memory_gib: float
    """As the driver reports it."""
    bandwidth_gb_per_s: float


GPU_SPECS: Final = {
    "l4": GpuSpec(121, 22.5, 300),
    "a10g": GpuSpec(70, 22.5, 600),
    "l40s": GpuSpec(362, 45.0, 864),
    "a100-40gb": GpuSpec(312, 40.0, 1555),
    "a100-80gb": GpuSpec(312, 80.0, 2039),
    "h100": GpuSpec(989, 79.6, 3350),
    "h200": GpuSpec(989, 140.4, 4800),
}
"""From NVIDIA's data sheets, without sparsity. SGLang's kernels need Ampere or newer, so a T4 is not here."""


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """A fleet for a constant load. Rates are submissions a second."""

    checkpoint: str
    gpu: str
    rate: float
    objective_s: float
    replica_rate: float
    source: str
    """Source of the replica's rate: `given`, or the figures that it was computed from."""
    replicas: int
    gpus_per_replica: int
    guard_in_flight: int
    """Submissions that a replica judges at a time."""
    nodes: int
    intake_members: int
    partitions: int
    gpu_hours_per_million: float
    notes: tuple[str, ...] = ()
    day: dict[str, float] | None = None
    """The result of a simulated day with the same mean load, if it was requested."""

    def as_dict(self) -> dict[str, object]:
        """Return the plan for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The figures for people."""
        rows = {
            "replicas": f"{self.replicas} of {self.gpus_per_replica} {self.gpu}, {self.replica_rate:.2f}/s each",
            "calls at a time": f"{self.guard_in_flight} for each replica",
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
    """Return the fleet that keeps `objective_s` at a constant `rate`.

    A replica has as many calls in flight as its checkpoint needs and its GPUs hold, whatever `rules` say.

    Raises:
        ConfigurationError: a name is unknown, or the checkpoint does not fit on eight of these GPUs.
    """
    model, spec = resolve_checkpoint(checkpoint), _find_gpu_spec(gpu)
    memory = model.plan_memory([round(spec.memory_gib * GIB)] * 8)
    if memory is None:
        raise ConfigurationError(
            f"{model.name} needs {model.gpu_memory_bytes / GIB:.0f} GiB, and eight {gpu} have less; "
            "choose a GPU with more memory"
        )
    gpus = memory.gpus
    rules = replace(rules, objective_s=objective_s, guard_in_flight=memory.in_flight)
    source = "given"
    if replica_rate is None:
        replica_rate = compute_replica_rate(model, spec, gpus, image, memory.in_flight)
        source = _describe_computation(model, spec, gpus, image)
    rules = replace(rules, replica_rate=replica_rate)
    replicas = max(1, math.ceil(round(rate / (1 - rules.headroom) / replica_rate, 6)))
    members = max(1, math.ceil(INTAKE_OVERSUBSCRIPTION * replicas * rules.guard_in_flight / rules.intake_in_flight))
    return CapacityPlan(
        checkpoint=model.name,
        gpu=gpu.lower(),
        rate=rate,
        objective_s=objective_s,
        replica_rate=replica_rate,
        source=source,
        replicas=replicas,
        gpus_per_replica=gpus,
        guard_in_flight=memory.in_flight,
        nodes=math.ceil(replicas / max(1, (gpus_per_node or gpus) // gpus)),
        intake_members=members,
        partitions=max(_MIN_PARTITIONS, _PARTITIONS_PER_MEMBER * members),
        gpu_hours_per_million=replicas * gpus / rate * 1e6 / 3600,
        notes=_make_notes(rules),
        day=_simulate_day(rate, gpus, rules) if day else None,
    )


def compute_replica_rate(model: Checkpoint, spec: GpuSpec, gpus: int, image: ImageSize, in_flight: int) -> float:
    """Return the submissions a second of one replica, computed as the module's docstring says."""
    share = TENSOR_PARALLEL_SHARE if gpus > 1 else 1.0
    operations = 2.0 * model.parameters * _count_tokens(model, image)
    reading_s = operations / (COMPUTE_SHARE * share * gpus * spec.bf16_tflops * 1e12)
    weights_bytes = 2.0 * model.parameters
    step_s = weights_bytes / (MEMORY_SHARE * share * gpus * spec.bandwidth_gb_per_s * 1e9)
    return 1 / (reading_s + ANSWER_TOKENS * step_s / in_flight)


def _find_gpu_spec(gpu: str) -> GpuSpec:
    if gpu.lower() not in GPU_SPECS:
        raise ConfigurationError(
            f"--gpu {gpu} is unknown; give the nearest of {', '.join(GPU_SPECS)} "
            "together with a measured --replica-rate"
        )
    return GPU_SPECS[gpu.lower()]


def _describe_computation(model: Checkpoint, spec: GpuSpec, gpus: int, image: ImageSize) -> str:
    described = (
        f"computed, not measured: {model.parameters / 1e9:g} billion weights, "
        f"{_count_tokens(model, image)} tokens read and {ANSWER_TOKENS:g} written, "
        f"{COMPUTE_SHARE:.0%} of {spec.bf16_tflops:g} TFLOPS and {MEMORY_SHARE:.0%} of {spec.bandwidth_gb_per_s:g} GB/s"
    )
    return f"{described}, {TENSOR_PARALLEL_SHARE:.0%} of both over {gpus} GPUs" if gpus > 1 else described


def _make_notes(rules: Rules) -> tuple[str, ...]:
    if rules.objective_s >= rules.start_s:
        return ()
    return (
        f"the objective is shorter than the start of a GPU replica ({rules.start_s:g} s), so submissions are late "
        "whenever the load suddenly needs more replicas than run; set SLUICE_GUARD_MIN_REPLICAS to the replicas "
        "that the highest rate needs",
    )


def _count_tokens(model: Checkpoint, image: ImageSize) -> int:
    return PROMPT_TOKENS + IMAGE_TOKENS_BY_ARCHITECTURE[model.architecture][image]


def _simulate_day(rate: float, gpus: int, rules: Rules) -> dict[str, float]:
    cluster = ClusterSpec(
        replica_rate=rules.replica_rate,
        guard_in_flight=rules.guard_in_flight,
        intake_in_flight=rules.intake_in_flight,
        max_replicas=max(20, 10 * math.ceil(rate / rules.replica_rate)),
    )
    scaler = SluiceScaler(rules, cluster)
    simulated = simulate_day(draw_arrivals(LoadProfile(mean_rate=rate), 1), scaler, cluster, 1)
    return {
        "p50_s": simulated.percentile_s(0.5),
        "p95_s": simulated.percentile_s(0.95),
        "p99_s": simulated.percentile_s(0.99),
        "minutes_within_objective": float((simulated.p99_by_minute_s() <= rules.objective_s).mean()),
        "gpu_hours": simulated.gpu_hours * gpus,
        "gpu_hours_per_million": simulated.gpu_hours * gpus / float(simulated.arrived.sum()) * 1e6,
        "fewest_replicas": float(simulated.replicas.min()),
        "most_replicas": float(simulated.replicas.max()),
    }
