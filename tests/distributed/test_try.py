from __future__ import annotations
import importlib.util, json, subprocess, sys, os, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from rats_video.training.metrics import read_metrics
import processes

EMA = ["teacher.kind=ema", "teacher.num_steps=4", "teacher.decay=0.5", "training.steps=3"]
LORA = ["student.weights.kind=lora", "student.weights.rank=2", "student.weights.alpha=2"]
VARIANTS = {"full": EMA, "lora": EMA + LORA}
PAR = {
    "ddp": [],
    "fsdp": ["parallel.shard=true"],
    "cp": ["parallel.context=2"],
    "both": ["parallel.context=2", "parallel.shard=true"],
    "reward": ["parallel.reward_ranks=1"],
}


def test_try(config_file, tmp_path):
    jobs = []
    for v, o in VARIANTS.items():
        t = time.time()
        processes.distill(str(config_file), {"overrides": o, "output": tmp_path / v / "one"})
        print(v, time.time() - t)
        for p, q in PAR.items():
            jobs.append({"overrides": o + q, "output": str(tmp_path / v / p)})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    t = time.time()
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            "--local-addr",
            "localhost",
            processes.__file__,
            str(config_file),
            str(tmp_path / "jobs.json"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(r.stdout[-3000:])
    open("/tmp/dist_err.txt", "w").write(r.stderr)
    print("launch", time.time() - t)
    for v in VARIANTS:
        one = tmp_path / v / "one"
        for p in PAR:
            two = tmp_path / v / p
            if not (two / "checkpoints" / "step-000003").exists():
                print(v, p, "MISSING")
                continue
            a, b = [read_metrics(x / "metrics.jsonl") for x in (one, two)]
            worst = max(
                (abs(x[k] - y[k]) / (abs(x[k]) + 1e-12), k, x[k], y[k])
                for x, y in zip(a, b)
                for k in x
                if k != "seconds"
            )
            out = [worst]
            for f in ("student", "teacher", "optimizer"):
                s, u = [load_file(x / "checkpoints" / "step-000003" / f"{f}.safetensors") for x in (one, two)]
                assert s.keys() == u.keys()
                out.append((f, max((float((s[k] - u[k]).abs().max() / (s[k].abs().max() + 1e-12)), k) for k in s)))
            print(v, p, out)
    assert 0
