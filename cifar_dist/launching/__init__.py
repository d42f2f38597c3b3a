"""What a launch would do, whether these machines can do it, and whether N processes equal one."""
