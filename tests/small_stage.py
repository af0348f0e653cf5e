"""A config for tests that start real processes: any stage at its small size. The variant is a case of `small_configs`.

python -m unclip_jax.train --config=tests/small_stage.py:prior_ar --workdir=… --config.frozen.clip=…
"""

from tests.small_configs import small


def get_config(variant="prior_ar"):
    """Returns the small config of a case, on captioned_shapes' smallest variant."""
    config = small(variant, data__variant="smoke", data__cache=False, total_steps=4, log__every_percent=25.0)
    with config.unlocked():
        if "fit_examples" in config:
            config.fit_examples = 256
    return config
