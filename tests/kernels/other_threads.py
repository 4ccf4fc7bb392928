"""The same work with other numbers of torch's threads."""

import torch


def with_threads(counts, work):
    """What `work` returns with each number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(work())
    finally:
        torch.set_num_threads(before)
    return found
