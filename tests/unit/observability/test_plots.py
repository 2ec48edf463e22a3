from matplotlib.figure import Figure

from qwench.observability.metrics import MetricLog
from qwench.observability.plots import plot_curves, read_curve
from qwench.observability.tracking import JsonlSink


def test_curves_are_read_over_their_own_axis_and_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog([JsonlSink(path)], num_steps_per_rollout=2)
    for rollout_id in range(3):
        metrics = {"rollout/raw_reward": 0.5 * rollout_id if rollout_id != 1 else float("nan")}
        log.log(rollout_id, metrics, steps=[{"train/loss": 1.0}, {"train/loss": 2.0}])
    assert read_curve(path, "rollout/raw_reward") == ([0, 2], [0.0, 1.0])
    assert read_curve(path, "train/loss") == ([0, 1, 2, 3, 4, 5], [1.0, 2.0] * 3)
    assert read_curve(path, "eval/none") == ([], [])

    picture = plot_curves(path, tmp_path / "new" / "curves.png", ["rollout/raw_reward", "train/loss", "eval/none"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_panel_names_its_metric_and_the_axis_of_its_steps(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    MetricLog([JsonlSink(path)], num_steps_per_rollout=1).log(0, {"rollout/raw_reward": 0.5}, steps=[{"train/loss": 2.0}])
    written: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: written.append(figure))
    plot_curves(path, tmp_path / "curves.png", ["rollout/raw_reward", "train/loss", "eval/none"])
    panels = [(panel.get_title(), panel.get_xlabel(), panel.lines[0].get_xydata().tolist()) for panel in written[0].axes]
    assert [panel.get_subplotspec().get_geometry() for panel in written[0].axes] == [(2, 2, i, i) for i in range(3)]
    assert panels == [
        ("rollout/raw_reward", "rollout", [[0.0, 0.5]]),
        ("train/loss", "optimizer step", [[0.0, 2.0]]),
        ("eval/none", "rollout", []),
    ]
