"""What everything else is built on: the fields of a call, its checks, its reference."""
