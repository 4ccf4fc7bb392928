"""What hands lists of tensors to a kernel."""

CHUNK = 2048 * 32


def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(CHUNK, noop_flag_buffer, tensor_lists, *args)
