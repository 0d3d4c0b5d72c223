"""The papers, equation by equation, in torch alone: schedules, predictions, timesteps, the step,
samplers, objectives."""
