"""The papers, equation by equation, in torch alone: schedules, steps, samplers, losses."""
