"""Fields of [train] that shape the optimizer: the settings they matter under, and another value."""

from typing import Any

FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    "optimizer": ({"adam_weight_decay": 0.1}, "adam"),
    "learning_rate": ({}, 2e-4),
    "lr_scheduler": ({}, "linear"),
    "lr_warmup_steps": ({"lr_scheduler": "cosine"}, 5),
    "lr_num_cycles": ({"lr_scheduler": "cosine_with_restarts"}, 3),
    "lr_power": ({"lr_scheduler": "polynomial"}, 2.0),
    "adam_beta1": ({}, 0.5),
    "adam_beta2": ({}, 0.5),
    "adam_epsilon": ({}, 1e-3),
    "adam_weight_decay": ({}, 0.1),
}
