"""Gaussian diffusion: schedules, losses and samplers that know no network."""
