"""Packing and batches again, in plain Python: what csrc/data/packing.cpp and rows.cpp must equal."""

import math

import numpy as np

from megatron_plm.philox import derive_key, philox4x32


def best_fit(tokens, labels, limits):
    """Rows of item numbers: longest first, each into the fullest row that still takes it."""
    rows, rooms = [], []
    for item in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        need = (tokens[item], labels[item], 1)
        fitting = [r for r, room in enumerate(rooms) if all(have >= n for have, n in zip(room, need, strict=True))]
        if fitting:
            chosen = min(fitting, key=lambda r: (rooms[r][0], r))
        else:
            chosen = len(rows)
            rows.append([])
            rooms.append(limits)
        rows[chosen].append(item)
        rooms[chosen] = tuple(have - n for have, n in zip(rooms[chosen], need, strict=True))
    return rows


def draws(key, sequence, position, purpose=0):
    return [int(word) for word in philox4x32(key, (position, purpose, sequence & 0xFFFFFFFF, sequence >> 32))]


def span_length(key, sequence, position, mean, longest):
    """The smallest n whose tail (1 - 1/mean)^n is at most a uniform draw, up to the longest."""
    uniform = (draws(key, sequence, position, purpose=1)[0] + 0.5) / 2**32
    n = 1
    while n < longest and uniform < (1 - 1 / mean) ** n:
        n += 1
    return n


def chosen_tokens(tokens, sequence, start, key, options, tokenizer):
    """{index: index of the token whose draw decides} of the tokens of one segment that are predicted."""
    letters = [i for i, token in enumerate(tokens) if token in set(tokenizer.residue_ids.tolist())]
    first = {i: draws(key, sequence, start + i)[0] for i in letters}
    if options.mask_selection == "bernoulli":
        return {i: i for i in letters if first[i] < options.mask_prob * 2**32}
    ranked = sorted(letters, key=lambda i: (first[i], i))
    wanted = max(min(len(letters), 1), math.floor(len(letters) * options.mask_prob + 0.5))
    if options.mask_selection == "exact":
        return {i: i for i in ranked[:wanted]}
    found = {}
    for i in ranked:
        for j in range(i, i + span_length(key, sequence, start + i, options.mask_span_length, longest=10)):
            if len(found) == wanted or j not in first or j in found:
                break
            found[j] = i
    return found


def segment(dataset, row, number, options, tokenizer, *, objective, seed, name):
    """(tokens in the input, {index: label}) of the `number`-th segment of a row."""
    sequence, start, length = (int(column[number]) for column in row[2:])
    whole = [tokenizer.cls_id, *dataset[sequence].tolist(), tokenizer.eos_id]
    tokens = whole[start : start + length]
    assert len(tokens) == length
    if objective == "clm":
        return tokens, dict(enumerate(tokens[1:]))
    key = derive_key("mask", seed, name, row.epoch)
    shown, labels = list(tokens), {}
    for index, decider in sorted(chosen_tokens(tokens, sequence, start, key, options, tokenizer).items()):
        labels[index] = tokens[index]
        action = draws(key, sequence, start + decider)[1] / 2**32
        if action < options.mask_token_share:
            shown[index] = tokenizer.mask_id
        elif action < options.mask_token_share + options.mask_random_share:
            standard = tokenizer.standard_ids
            shown[index] = int(standard[draws(key, sequence, start + index)[2] * len(standard) >> 32])
    return shown, labels


def assert_batch_holds(batch, rows, datasets, options, tokenizer, *, objective, seed, names):
    """Check every entry of a batch against the rows that it was built of."""
    num_rows, row_tokens = batch.tokens.shape
    cuts, num_tokens, num_labels = [0], 0, 0
    for b, row in enumerate(rows):
        tokens, positions, ids, index, label = [], [], [], [], []
        for number in range(len(row.sequence)) if row else ():
            shown, labels = segment(
                datasets[row.dataset], row, number, options, tokenizer,
                objective=objective, seed=seed, name=names[row.dataset],
            )  # fmt: skip
            index += [len(tokens) + i for i in labels]
            label += list(labels.values())
            tokens += shown
            positions += range(len(shown))
            ids += [number + 1] * len(shown)
            cuts.append(b * row_tokens + len(tokens))
        num_tokens += len(tokens)
        num_labels += len(label)
        padding, unused = row_tokens - len(tokens), batch.label_id.shape[1] - len(label)
        assert batch.tokens[b].tolist() == tokens + [tokenizer.pad_id] * padding
        assert batch.positions[b].tolist() == positions + [0] * padding
        assert batch.segment_ids[b].tolist() == ids + [0] * padding
        assert batch.label_index[b].tolist() == index + [0] * unused
        assert batch.label_id[b].tolist() == label + [-100] * unused
        cuts += [(b + 1) * row_tokens] * bool(cuts[-1] != (b + 1) * row_tokens)
    room = 1 << (max(len(cuts) - 1, 4 * num_rows) - 1).bit_length()  # of segments: the next power of two
    most = num_rows * (max(1, row_tokens // 8) + 1) if options.row_layout == "packed" else 2 * num_rows
    cuts += [num_rows * row_tokens] * (min(room, most) + 1 - len(cuts))
    assert batch.cu_seqlens.tolist() == cuts
    assert (batch.num_tokens, batch.num_labels) == (num_tokens, num_labels)


def fills(rows, row_tokens):
    """Share of the rows' tokens that is no padding."""
    return sum(int(row.length.sum()) for row in rows) / (row_tokens * len(rows))


class MemoryDataset:
    """Proteins in memory, with the interface of IndexedDataset that the loader uses; clusters of so many sequences."""

    prefix = "memory"

    def __init__(self, proteins, clusters=None):
        self._proteins = proteins
        self.tokens = np.concatenate(proteins)
        self.lengths = np.array([len(protein) for protein in proteins], dtype=np.int32)
        self.pointers = (np.cumsum(self.lengths, dtype=np.int64) - self.lengths) * self.tokens.itemsize
        sizes = np.ones(len(proteins), dtype=np.int64) if clusters is None else np.array(clusters)
        self.document_indices = np.concatenate([[0], np.cumsum(sizes)])

    @property
    def num_documents(self):
        return len(self.document_indices) - 1

    def __len__(self):
        return len(self._proteins)

    def __getitem__(self, index):
        return self._proteins[index]
