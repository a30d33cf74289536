"""Training a frozen backbone with as little memory as its backward pass needs."""
