"""Communication between the host and its workers: JSON messages, shared memory, one page of control words."""
