"""What `start_latency` is compared with: a training script as one would write it for `ray job submit`.

    python -m tests.benchmarks.start_script SPEC.json OUT.json DATA_ROOT

Ray Train's TorchTrainer with the same number of workers, the same model under DeepSpeed, the same images, one step.
OUT.json says when each part of it was reached, in seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train_one_step(config: dict[str, Any]) -> None:
    """One worker. Rank 0 writes the times."""
    reached = {"script": config["began"], "workers": time.time()}
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_SIZE"] = str(config["world_size"])
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F

    import vit
    from configs.data import TorchvisionSource
    from configs.load import parse_spec
    from configs.spec import PretrainJob
    from workers.data.loader import normalise
    from workers.data.torchvision_sets import open_torchvision
    from workers.distributed import Ranks
    from workers.engine import build_engine

    torch.set_num_threads(1)
    reached["imports"] = time.time()
    spec = parse_spec(config["spec"])
    assert isinstance(spec, PretrainJob)
    size = spec.train.global_batch_size // config["world_size"]
    source = TorchvisionSource(type="torchvision", name="FashionMNIST", download="never")
    images = open_torchvision(source, "train", Path(config["data_root"]), 1)
    rank, world = dist.get_rank(), dist.group.WORLD
    assert world is not None
    ranks = Ranks(rank, config["world_size"], rank, torch.device("cpu"), world)
    model = spec.model.model_copy(update={"num_classes": 10}).vit()
    engine = build_engine(vit.build(model), spec, ranks, size)
    reached["engine"] = time.time()
    chosen = np.arange(rank * size, (rank + 1) * size)
    batch = images.read_many(chosen)
    assert batch is not None
    logits = engine.forward(normalise(batch, (0.5,), (0.5,)))
    engine.backward(F.cross_entropy(logits, torch.from_numpy(images.labels[chosen])))
    engine.step(1e-3)
    reached["first step"] = time.time()
    if rank == 0:
        Path(config["out"]).write_text(json.dumps(reached))


def main(argv: list[str]) -> int:
    began = time.time()
    spec_file, out, data_root = argv
    spec = json.loads(Path(spec_file).read_text())
    workers = spec["resources"]["workers"]
    config = {"began": began, "spec": spec, "out": out, "data_root": data_root, "world_size": workers}
    trainer = TorchTrainer(
        train_one_step,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=str(Path(out).parent / "ray-train")),
    )
    trainer.fit()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
