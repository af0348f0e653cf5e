"""Networks: pure Flax modules that know no diffusion, no data and no training."""
