"""What can be known before a job waits in a queue: `credit check`, `credit check parity`, `credit plan`."""
