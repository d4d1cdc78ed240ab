"""Where jobs run: processes with limits of time and memory."""
