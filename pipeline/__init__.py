"""Configuration, plan, runner, engines, and the command line."""
