"""The committed figures keep their bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rats_video.backbones.architecture import preset_names
from rats_video.config.load import load_config
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.compare_result import read_compare_result
from rats_video.evaluation.compare_tables import markdown, summary_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIRST = RESULTS / "first_model"  # made with the first embedded model


def read(name: str, folder: Path = RESULTS) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_every_packaged_configuration_is_planned_as_it_is_and_fits() -> None:
    rows = read("plans")
    planned = {load_config(DistillConfig, name, group="distill").architecture for name in rows}
    assert sorted(filter(None, planned)) == preset_names()
    for name, row in rows.items():
        cfg = load_config(DistillConfig, name, group="distill")
        assert (row["clip"], row["clips_a_step"]) == (cfg.clip.model_dump(), cfg.training.batch_size), name
        assert row["steps"] == cfg.training.steps, name
        assert row["fits"], name
        assert 10 < row["needed_gib"] < 80, name


def test_a_step_costs_little_more_than_its_calls() -> None:
    step = read("speed")["step"]
    assert 0.9 < step["ratio"] <= step["bar"] == 1.10
    assert sum(step["parts seconds"].values()) == pytest.approx(step["calls alone seconds"], rel=0.1)


def test_sampling_is_no_slower_than_the_stock_pipeline() -> None:
    sampling = read("speed")["sampling"]
    assert sampling["largest pixel difference"] < 1e-4
    assert sampling["ratio"] <= sampling["bar"] == 1.02
    assert sampling["ratio to latents"] <= 1.02


def test_roles_cost_little_more_than_plain_lora() -> None:
    for row in read("levers")["lora roles"].values():
        assert 1.0 < row["ratio"] <= 1.15


def test_every_lever_is_measured_or_says_why_not() -> None:
    levers = read("levers")["levers"]
    saving = (
        "activation checkpointing", "gradient of 1 step", "bfloat16 base", "int8 base", "nf4 base",
        "block inputs on the host", "cached text", "offload by block",
    )  # fmt: skip
    for name in saving:
        assert levers[name]["memory ratio"] < 1, name
    for name, row in levers.items():
        assert "not here" in row or row["time ratio"] > 0, name


def test_pages_quote_the_committed_plans() -> None:
    table = (RESULTS / "plans.md").read_text(encoding="utf-8").split("\n\n")[0]
    assert table in page("scale")


def test_pages_quote_the_committed_ratios() -> None:
    text_of_page = page("scale")
    speed, roles = read("speed"), read("levers")["lora roles"]
    assert f"takes {speed['step']['ratio']:.2f} times as long as its network" in text_of_page
    assert f"calls takes {speed['sampling']['ratio']:.2f} times as long" in text_of_page
    assert f"peak is {max(row['ratio'] for row in roles.values()):.2f} times" in text_of_page
    assert f"{speed['role switch']['ours ms']:.1f} ms for" in text_of_page


def test_pages_quote_the_committed_decodes() -> None:
    text_of_page = page("scale")
    wan = [row for row in read("decode")["rows"] if row["decoder"].startswith("Wan 2.1")]
    rows = {(row["mode"], row["latent_frames"]): row for row in wan}
    for mode in ("plain", "checkpoint", "window 2, checkpoint"):
        for frames in (3, 21):
            saved, peak = rows[mode, frames]["saved"] / 1e9, rows[mode, frames]["peak"] / 1e9
            assert f" {saved:.{0 if saved > 10 else 1}f} / {peak:.0f} |" in text_of_page


@pytest.mark.parametrize("judge", ["sighted", "blind"])
def test_pages_quote_the_committed_guard_study(judge: str) -> None:
    table = (FIRST / f"guard_{judge}.md").read_text(encoding="utf-8").strip()
    assert table in page("first_model")


def test_no_attribute_of_the_kept_student_falls_far_under_the_teachers() -> None:
    study = read("guard_sighted", FIRST)
    kept = [row["metrics"] for row in study["rows"] if (row["arm"], row["student"]) == ("published_gate", "best")]
    assert len(kept) == 3
    for metrics in kept:
        assert metrics["adherence"] > study["teacher"]["adherence"]
        for name in ("speed", "color", "shape", "direction", "background"):
            assert metrics[name] >= study["teacher"][name] - 0.02, name


def test_docs_quote_the_committed_policy() -> None:
    text = page("rewards")
    change = read("policy_pairs", FIRST)["policy - imitation"]["adherence"]
    assert f"(adherence {change['mean']:+.3f} +- {change['ci95']:.3f} against imitation alone" in text


def test_pages_quote_the_committed_kills() -> None:
    study = read("kills")
    assert study["identical"]
    assert all(study["same"].values())
    text = " ".join(page("nothing_lost").split())
    assert f"after {study['kills']} SIGKILLs at random moments of {study['steps']} steps" in text


def test_docs_quote_the_committed_latent_reward() -> None:
    text = " ".join(page("rewards").split())
    study = read("latent_reward", FIRST)
    time, memory = study["step"]["time ratio"], study["step"]["memory ratio"]
    assert f"takes {time['step']:.2f} of the time, {time['step, teacher stored']:.2f} where" in text
    assert f"{memory['step']:.2f} of the memory" in text
    agreement = study["agreement with the pixel reward"]
    assert f"to {agreement['rank_correlation_samples']:.2f} (Spearman)" in text
    assert f"all alike good, to {agreement['rank_correlation_student']:.2f}." in text
    change = study["adherence"]["latent - pixel"]
    assert f"{change['adherence']['mean']:+.3f} +- {change['adherence']['ci95']:.3f} against" in text
    assert f"in colour {change['color']['mean']:+.3f} +- {change['color']['ci95']:.3f}." in text


def test_shipped_latent_reward_ranks_as_the_pixel_reward_does() -> None:
    assert read("latent_reward", FIRST)["agreement with the pixel reward"]["rank_correlation_samples"] >= 0.9


def test_a_training_step_does_not_wait_for_its_clips() -> None:
    loader = read("loader")
    assert loader["wait share"] < loader["bar"] == 0.01
    assert loader["read time ratio"] < 1.5


def test_memory_stays_bounded_over_many_opens() -> None:
    memory = read("reader")["memory"]
    assert memory["opens"] >= 100
    assert memory["most"] < memory["resident after the first"] + 2**27


def test_pages_quote_the_committed_comparison_of_methods() -> None:
    compared = read_compare_result(FIRST / "compare.json")
    assert (compared.settings["missing"], compared.settings["budget"]) == ([], 50_400)
    assert {row.seed for row in compared.rows} == {None, 0, 1, 2}
    assert (FIRST / "compare.md").read_text(encoding="utf-8") == markdown(compared)
    text_of_page = page("first_model")
    assert summary_table(compared, 4) in text_of_page

    text = " ".join(text_of_page.split())
    rats, refl = compared.mean_of("rats", 4), compared.mean_of("refl", 4)
    early = next(point for point in compared.curve if point.method == "refl")
    assert rats is not None
    assert refl is not None
    assert early.cost.updates == 225
    for name in ("heldout_reward", "adherence"):
        theirs, ours = (f"{point.metrics[name].mean:.3f} ± {point.metrics[name].ci95:.3f}" for point in (early, rats))
        assert f"({theirs} against {ours})" in text
    others = [mean.metrics for mean in compared.means if mean.nfe == 4]
    for name in ("reward", "heldout_reward", "adherence"):
        assert refl.metrics[name].mean == max(metrics[name].mean for metrics in others), name
    assert refl.metrics["diversity_share"].mean == min(metrics["diversity_share"].mean for metrics in others)
    won = {w.against: w for w in compared.wins if (w.method, w.nfe, w.metric) == ("rats", 4, "heldout_reward")}
    for against, words in (("teacher", "of clips against the 50-step teacher"), ("imitation", "against imitation")):
        rate, ci95 = won[against].rate, won[against].ci95
        assert ci95 is not None
        assert rate - ci95 > 0.5
        after = " on the held-out reward" if against == "teacher" else ""
        assert f"{rate:.0%} ± {ci95:.0%} {words}{after}" in text
    kept = {name: compared.mean_of(name, 4).metrics["diversity_share"].mean for name in ("rats", "rats_floor", "rtdmd")}  # type: ignore[union-attr]  # all are there
    assert f"loses {1 - kept['rats']:.0%} of the teacher's diversity" in text
    assert f"loses {1 - kept['rats_floor']:.0%} at no lower adherence" in text
    assert f"which keeps {kept['rtdmd']:.0%}" in text


def test_pages_quote_the_students_that_ship() -> None:
    compared = read_compare_result(RESULTS / "compare.json")
    assert {row.seed for row in compared.rows} == {None, 0, 1, 2}
    assert (RESULTS / "compare.md").read_text(encoding="utf-8") == markdown(compared)
    for nfe in (2, 4):
        assert summary_table(compared, nfe) in page("results")
    means = {who: compared.mean_of(who, nfe) for who, nfe in (("teacher", None), ("rats", 4))}
    teacher, student = (mean.metrics for mean in means.values() if mean is not None)
    for name in ("reward", "smoothness"):
        assert student[name].mean - student[name].ci95 > teacher[name].mean + teacher[name].ci95, name
    leads = {(each.against, each.nfe, each.metric): (each.mean, each.ci95) for each in compared.differences}
    for name in ("reward", "heldout_reward", "adherence"):  # clip by clip it is ahead of its teacher on all three
        mean, ci95 = leads["teacher", 4, name]
        assert ci95 is not None
        assert mean > ci95, name
    shares = {who: compared.mean_of(who, 4).metrics["diversity_share"].mean for who in ("rats", "refl")}  # type: ignore[union-attr]  # both are there
    assert shares["rats"] > 0.85
    assert shares["refl"] < 0.5
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for who, nfe in (("teacher", None), ("base", 4), ("rats", 4), ("refl", 4), ("base", 2), ("rats", 2)):
        mean = compared.mean_of(who, nfe)
        assert mean is not None
        cells = [mean.metrics[name] for name in ("adherence", "heldout_reward", "reward")]
        share = mean.metrics["diversity_share"]
        kept = "1" if who == "teacher" else f"{share.mean:.2f} ± {share.ci95:.2f}"
        quoted = " | ".join(f"{m.mean:.3f} ± {m.ci95:.3f}" for m in cells)
        assert f"| {mean.nfe} | {quoted} | {kept} |" in readme.replace("**", "")


def test_the_page_on_motion_quotes_its_comparison() -> None:
    compared = read_compare_result(RESULTS / "motion.json")
    assert ({row.seed for row in compared.rows}, compared.settings["missing"]) == ({None, 0, 1, 2}, [])
    assert (RESULTS / "motion.md").read_text(encoding="utf-8") == markdown(compared)
    assert summary_table(compared, 4) in page("motion")
    text = " ".join(page("motion").split())
    moved = {}
    for who in ("alpha_2", "frame_gate", "clip_gate", "reward_and_motion", "reward_only"):
        mean = compared.mean_of(who, 4)
        assert mean is not None
        moved[who] = mean.metrics["displacement"]
        assert f"{moved[who].mean:.3f} ± {moved[who].ci95:.3f}" in text
    kept, stopped = moved["alpha_2"], moved["reward_only"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"objects {stopped.mean:.2f} ± {stopped.ci95:.2f} of their way" in readme
    assert f"brings them {kept.mean:.2f} ± {kept.ci95:.2f} of it" in readme
    assert kept.ci95 is not None
    assert stopped.ci95 is not None
    assert kept.mean - kept.ci95 > 0.9
    assert stopped.mean + stopped.ci95 < 0.2
    leads = {(each.against, each.metric): each for each in compared.differences if each.nfe == 4}
    for against, metric in (
        ("teacher", "reward"), ("teacher", "heldout_reward"), ("teacher", "adherence"), ("floor", "heldout_reward"),
        ("frame_gate", "heldout_reward"), ("motion_gate", "heldout_reward"), ("base", "heldout_reward"),
    ):  # fmt: skip
        lead = leads[against, metric]
        assert f"{lead.mean:.3f} ± {lead.ci95:.3f}" in text, (against, metric)
    clear = leads["teacher", "reward"]
    assert clear.ci95 is not None
    assert clear.mean > clear.ci95
