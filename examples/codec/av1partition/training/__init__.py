"""The loss, the loop, resuming it, and what can be trained on a frozen backbone."""
