"""The sinks that the settings ask for."""

from __future__ import annotations

from orchestrator.control.sinks.mlflow import MlflowSink
from orchestrator.control.sinks.sink import Sink
from orchestrator.control.sinks.tensorboard import TensorBoardSink
from orchestrator.control.sinks.wandb import WandbSink
from orchestrator.settings import Settings
from orchestrator.storage.store import ObjectStore


def configured_sinks(settings: Settings, store: ObjectStore) -> tuple[Sink, ...]:
    """None of their packages is imported yet."""
    sinks: list[Sink] = []
    every_s, url = settings.sink_every_s, settings.public_url
    if settings.tensorboard:
        sinks.append(TensorBoardSink(store, every_s))
    uri = settings.mlflow_tracking_uri.get_secret_value()
    if uri:
        sinks.append(MlflowSink(uri, settings.mlflow_experiment, every_s, url))
    if settings.wandb_project:
        entity, mode, folder = settings.wandb_entity, settings.wandb_mode, settings.wandb_dir
        sinks.append(WandbSink(settings.wandb_project, entity, mode, folder, every_s, url))
    return tuple(sinks)
