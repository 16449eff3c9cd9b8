"""The public functions: check, describe the target, call one operator, reduce."""
