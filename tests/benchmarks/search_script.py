"""What `search` is compared with: the pattern that Ray documents for Tune with Ray Train V2.

    python -m tests.benchmarks.search_script SPEC.json OUT_FOLDER DATA_ROOT

A Tuner over a function that calls TorchTrainer.fit with TuneReportCallback: each trial is a driver, a controller and
its workers. Model, images, batch and number of steps are those of SPEC.json, a search. Each trial's worker writes into
OUT_FOLDER how many seconds passed from the start of its first step to the end of its last.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback


def train(config: dict[str, Any]) -> None:
    """The worker of a trial."""
    import numpy as np
    import torch
    from ray.train import report
    from torch.nn import functional as F

    import vit
    from configs.data import TorchvisionSource
    from configs.load import parse_spec
    from configs.spec import PretrainJob
    from workers.data.loader import normalise
    from workers.data.torchvision_sets import open_torchvision

    torch.set_num_threads(1)
    spec = parse_spec(config["base"])
    assert isinstance(spec, PretrainJob)
    source = TorchvisionSource(type="torchvision", name="FashionMNIST", download="never")
    images = open_torchvision(source, "train", Path(config["data_root"]), 1)
    model = vit.build(spec.model.model_copy(update={"num_classes": 10}).vit())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    order = np.random.default_rng(spec.train.seed)
    steps = spec.schedule.total_steps
    assert steps is not None
    began = time.perf_counter()
    for _ in range(steps):
        chosen = order.integers(0, len(images.labels), spec.train.global_batch_size)
        batch = images.read_many(chosen)
        assert batch is not None
        loss = F.cross_entropy(model(normalise(batch, (0.5,), (0.5,))), torch.from_numpy(images.labels[chosen]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    in_steps_s = time.perf_counter() - began
    (Path(config["out"]) / f"{uuid.uuid4().hex}.json").write_text(json.dumps(in_steps_s))
    report({"loss": loss.item()})


def trial(config: dict[str, Any]) -> None:
    """A trial: the driver of a Train run, in an actor of Tune."""
    trainer = TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name=f"trial-{tune.get_context().get_trial_id()}",
            storage_path=str(Path(config["out"]) / "ray-train"),
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def main(argv: list[str]) -> int:
    spec_file, out, data_root = argv
    spec = json.loads(Path(spec_file).read_text())
    rates = tune.grid_search(spec["space"]["optim.lr"]["values"])
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space={"base": spec["base"], "data_root": data_root, "out": out, "lr": rates},
        tune_config=tune.TuneConfig(max_concurrent_trials=spec["concurrency"]),
        run_config=tune.RunConfig(storage_path=str(Path(out) / "ray-tune")),
    )
    results = tuner.fit()
    return 1 if results.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
