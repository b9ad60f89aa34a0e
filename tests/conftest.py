"""Checks annotations at run time, tensor shapes included, in the code that handles tensors.

As for mypy, an int is a valid float (PEP 484's numeric tower). The hook must be in place before
the packages are imported, and pytest's own option for it accepts no such configuration.
"""

from jaxtyping import install_import_hook

install_import_hook(
    [
        "service.adapters.peft_format",
        "service.adapters.slot_bank",
        "service.inference",
        "service.synthesis",
        "training",
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

pytest_plugins = [
    "tests.fixtures.redis_server",
    "tests.fixtures.redis_cache_kit",
    "tests.fixtures.tiny_bundle",
    "tests.fixtures.tiny_detection_bundle",
    "tests.fixtures.tiny_open_clip",
    "tests.fixtures.tiny_reproduction",
]
