"""`sluice plan`: the fleet that a load needs."""

import json
import math

import pytest
from typer.testing import CliRunner

from pipelines.autoscaling import capacity
from pipelines.autoscaling.capacity import GPU_SPECS, IMAGE_TOKENS_BY_ARCHITECTURE, compute_replica_rate, plan_capacity
from pipelines.cli.main import app
from services.core.errors import ConfigurationError
from services.guard.checkpoints import CHECKPOINTS, resolve_checkpoint

SMALL, LARGE = "LlavaGuard-v1.2-0.5B-OV", "LlavaGuard-v1.2-7B-OV"


def test_plan_with_a_measured_rate_uses_it() -> None:
    found = plan_capacity(rate=400, objective_s=600, checkpoint=SMALL, gpu="l4", replica_rate=10)
    assert found.replicas == 43  # 40, and 5 % that stay free
    assert found.nodes == 43
    assert found.intake_members == 14
    assert found.partitions == 28
    assert found.gpu_hours_per_million == pytest.approx(43 / 400 * 1e6 / 3600)
    assert found.source == "given"


def test_computed_rate_equals_the_calculation_by_hand() -> None:
    """7B on an H100: 5854 tokens of 1024 x 768, 16 GFLOP each; a step of the answer reads 16 GB."""
    reading_s = 2 * 8e9 * 5854 / (0.4 * 989e12)
    writing_s = 23.5 * 16e9 / (0.6 * 3350e9) / 16
    assert compute_replica_rate(resolve_checkpoint(LARGE), GPU_SPECS["h100"], 1, "medium", 16) == pytest.approx(
        1 / (reading_s + writing_s)
    )
    found = plan_capacity(rate=10, objective_s=600, checkpoint=LARGE, gpu="H100")
    assert found.source.startswith("computed, not measured")
    assert found.replica_rate == pytest.approx(1 / (reading_s + writing_s))


def test_large_checkpoint_is_spread_over_several_gpus() -> None:
    found = plan_capacity(rate=10, objective_s=600, checkpoint=LARGE, gpu="l4")
    assert found.gpus_per_replica == 2
    assert found.nodes == found.replicas
    eight = plan_capacity(rate=10, objective_s=600, checkpoint=LARGE, gpu="l4", gpus_per_node=8)
    assert eight.nodes == -(-found.replicas // 4)


@pytest.mark.parametrize(
    ("checkpoint", "gpu", "calls"),
    [(SMALL, "l4", 16), (SMALL, "h100", 48), (SMALL, "h200", 48), (LARGE, "l4", 12), ("LlavaGuard-v1.1-7B", "l4", 4)],
)
def test_calls_at_a_time_are_those_of_the_checkpoint_on_the_gpu(checkpoint: str, gpu: str, calls: int) -> None:
    """With 16 for all, a plan of 0.5B models on large GPUs had too few intake members to keep them busy."""
    found = plan_capacity(rate=2000, objective_s=600, checkpoint=checkpoint, gpu=gpu, replica_rate=10)
    assert found.guard_in_flight == calls
    assert found.intake_members == math.ceil(1.25 * found.replicas * calls / 64)


def test_computed_rate_uses_the_calls_at_a_time_of_the_gpu() -> None:
    found = plan_capacity(rate=10, objective_s=600, checkpoint=SMALL, gpu="h100")
    row, spec = resolve_checkpoint(SMALL), GPU_SPECS["h100"]
    assert found.replica_rate == pytest.approx(compute_replica_rate(row, spec, 1, "medium", 48))
    assert found.replica_rate != pytest.approx(compute_replica_rate(row, spec, 1, "medium", 16))


def test_every_architecture_has_image_tokens() -> None:
    assert {row.architecture for row in CHECKPOINTS} == set(IMAGE_TOKENS_BY_ARCHITECTURE)


def test_objective_shorter_than_a_start_adds_a_note() -> None:
    assert plan_capacity(rate=10, objective_s=30, checkpoint=SMALL, gpu="l4").notes
    assert not plan_capacity(rate=10, objective_s=600, checkpoint=SMALL, gpu="l4").notes


def test_plan_with_an_unknown_name_is_rejected() -> None:
    with pytest.raises(ConfigurationError, match="h100"):
        plan_capacity(rate=1, objective_s=600, checkpoint=SMALL, gpu="voodoo")
    with pytest.raises(ConfigurationError, match="neither a folder"):
        plan_capacity(rate=1, objective_s=600, checkpoint="no-such-model", gpu="l4")


def test_plan_command_prints_json_or_a_table() -> None:
    given = ["plan", "--rate", "400/s", "--objective", "30s", "--checkpoint", SMALL, "--gpu", "l4"]
    found = CliRunner().invoke(app, [*given, "--json"])
    assert found.exit_code == 0
    read = json.loads(found.stdout)
    assert read["replicas"] >= 400 / read["replica_rate"]
    assert {"nodes", "partitions", "gpu_hours_per_million"} <= read.keys()
    shown = CliRunner().invoke(app, given)
    assert "computed, not measured" in shown.stderr
    assert "GPU-hours a million" in shown.stdout


def test_plan_with_a_day_reports_its_waits_and_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    short = capacity.draw_arrivals(capacity.LoadProfile(mean_rate=20), 1)[: 3600 + 7200]
    monkeypatch.setattr(capacity, "draw_arrivals", lambda load, seed: short)
    simulated = []
    scaler = capacity.SluiceScaler
    monkeypatch.setattr(
        capacity, "SluiceScaler", lambda rules, cluster: simulated.append((rules, cluster)) or scaler(rules, cluster)
    )
    found = plan_capacity(rate=20, objective_s=300, checkpoint=SMALL, gpu="h100", replica_rate=5, day=True)
    ((rules, cluster),) = simulated
    assert rules.guard_in_flight == cluster.guard_in_flight == 48
    assert (rules.objective_s, rules.replica_rate) == (300, 5)
    assert found.day is not None
    assert found.day["p99_s"] > 0
    assert found.day["most_replicas"] >= found.day["fewest_replicas"] > 0
