"""What every long command needs: processes, signals, progress, seeds, formatting, the environment."""
