"""Dynamic key-value memory network (DKVMN) for knowledge tracing on simulated students."""
import argparse
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.init as init
from sklearn import metrics


def simulate_students(n_students, n_questions, n_concepts, rng):
    """Students answer exercises of hidden concepts and get better at a concept by practising it."""
    concept = rng.randint(n_concepts, size=n_questions)
    difficulty = rng.randn(n_questions) * 1.4
    logs = []
    for _ in range(n_students):
        skill = rng.randn() * 0.8 + rng.randn(n_concepts) * 1.6
        gain = rng.uniform(0.05, 0.35)
        q_seq, r_seq = [], []
        for _ in range(rng.randint(12, 31)):
            q = rng.randint(n_questions)
            c = concept[q]
            p = 1 / (1 + math.exp(-2.2 * (skill[c] - difficulty[q])))
            q_seq.append(q + 1)
            r_seq.append(int(rng.rand() < p))
            skill[c] += gain
        logs.append((q_seq, r_seq))
    return logs


def to_arrays(logs, seqlen, n_question):
    q_data = np.zeros((len(logs), seqlen), dtype=np.int64)
    qa_data = np.zeros((len(logs), seqlen), dtype=np.int64)
    target = np.full((len(logs), seqlen), -1.0, dtype=np.float32)
    for i, (q, r) in enumerate(logs):
        q_data[i, :len(q)] = q
        qa_data[i, :len(q)] = np.array(q) + np.array(r) * n_question
        target[i, :len(q)] = r
    return q_data, qa_data, target


class DKVMNHeadGroup(nn.Module):
    def __init__(self, memory_size, memory_state_dim, is_write):
        super().__init__()
        self.memory_size = memory_size
        self.memory_state_dim = memory_state_dim
        if is_write:
            self.erase = nn.Linear(memory_state_dim, memory_state_dim, bias=True)
            self.add = nn.Linear(memory_state_dim, memory_state_dim, bias=True)
            init.kaiming_normal_(self.erase.weight)
            init.kaiming_normal_(self.add.weight)
            init.constant_(self.erase.bias, 0)
            init.constant_(self.add.bias, 0)

    @staticmethod
    def addressing(control_input, memory):
        """(batch, key_dim) against (memory_size, key_dim): correlation weight by a softmax over the slots."""
        similarity_score = torch.matmul(control_input, torch.t(memory))
        return torch.softmax(similarity_score, dim=1)

    def read(self, memory, read_weight):
        w = read_weight.view(-1, 1)
        m = memory.contiguous().view(-1, self.memory_state_dim)
        rc = torch.mul(w, m).view(-1, self.memory_size, self.memory_state_dim)
        return torch.sum(rc, dim=1)

    def write(self, control_input, memory, write_weight):
        erase_signal = torch.sigmoid(self.erase(control_input)).unsqueeze(1)
        add_signal = torch.tanh(self.add(control_input)).unsqueeze(1)
        w = write_weight.unsqueeze(2)
        return memory * (1 - w * erase_signal) + w * add_signal


class DKVMN(nn.Module):
    def __init__(self, memory_size, key_dim, value_dim, init_memory_key):
        super().__init__()
        self.key_head = DKVMNHeadGroup(memory_size, key_dim, is_write=False)
        self.value_head = DKVMNHeadGroup(memory_size, value_dim, is_write=True)
        self.memory_key = init_memory_key

    def attention(self, control_input):
        return self.key_head.addressing(control_input, self.memory_key)


class MODEL(nn.Module):
    def __init__(self, n_question, q_embed_dim, qa_embed_dim, memory_size, final_fc_dim):
        super().__init__()
        self.init_memory_key = nn.Parameter(torch.randn(memory_size, q_embed_dim))
        init.kaiming_normal_(self.init_memory_key)
        self.init_memory_value = nn.Parameter(torch.randn(memory_size, qa_embed_dim))
        init.kaiming_normal_(self.init_memory_value)
        self.mem = DKVMN(memory_size, q_embed_dim, qa_embed_dim, self.init_memory_key)
        self.q_embed = nn.Embedding(n_question + 1, q_embed_dim, padding_idx=0)
        self.qa_embed = nn.Embedding(2 * n_question + 1, qa_embed_dim, padding_idx=0)
        self.read_embed_linear = nn.Linear(qa_embed_dim + q_embed_dim, final_fc_dim, bias=True)
        self.predict_linear = nn.Linear(final_fc_dim, 1, bias=True)

    def forward(self, q_data, qa_data, target):
        batch_size, seqlen = q_data.shape
        q_embed_data = self.q_embed(q_data)
        qa_embed_data = self.qa_embed(qa_data)
        memory_value = self.init_memory_value.unsqueeze(0).repeat(batch_size, 1, 1)

        value_read_content_l = []
        for i in range(seqlen):
            # read with the exercise, before its answer is written
            correlation_weight = self.mem.attention(q_embed_data[:, i])
            value_read_content_l.append(self.mem.value_head.read(memory_value, correlation_weight))
            memory_value = self.mem.value_head.write(qa_embed_data[:, i], memory_value, correlation_weight)

        all_read_value_content = torch.stack(value_read_content_l, 1)
        predict_input = torch.cat([all_read_value_content, q_embed_data], 2)
        read_content_embed = torch.tanh(self.read_embed_linear(predict_input))
        pred = self.predict_linear(read_content_embed).view(-1)

        mask = target.view(-1).ge(0)
        filtered_pred = torch.masked_select(pred, mask)
        filtered_target = torch.masked_select(target.view(-1), mask)
        loss = nn.functional.binary_cross_entropy_with_logits(filtered_pred, filtered_target)
        return loss, torch.sigmoid(filtered_pred), filtered_target


def adjust_learning_rate(optimizer, epoch, init_lr):
    lr = init_lr * (0.5 ** (epoch // 6))
    for param_group in optimizer.param_groups:
        param_group['lr'] = lr
    return lr


def train(model, params, optimizer, q_data, qa_data, target):
    model.train()
    order = np.random.permutation(len(q_data))
    pred_list, target_list = [], []
    for idx in range(len(q_data) // params.batch_size):
        rows = order[idx * params.batch_size:(idx + 1) * params.batch_size]
        optimizer.zero_grad()
        loss, pred, tgt = model(*(torch.from_numpy(x[rows]) for x in (q_data, qa_data, target)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=params.maxgradnorm)
        optimizer.step()
        pred_list.append(pred.detach().numpy())
        target_list.append(tgt.numpy())
    all_pred, all_target = np.concatenate(pred_list), np.concatenate(target_list)
    return metrics.log_loss(all_target, all_pred.astype(np.float64)), metrics.roc_auc_score(all_target, all_pred)


def test(model, q_data, qa_data, target):
    model.eval()
    with torch.no_grad():
        loss, pred, tgt = model(*map(torch.from_numpy, (q_data, qa_data, target)))
    return loss.item(), metrics.roc_auc_score(tgt.numpy(), pred.numpy())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--q_embed_dim', type=int, default=16)
    parser.add_argument('--qa_embed_dim', type=int, default=32)
    parser.add_argument('--memory_size', type=int, default=8)
    parser.add_argument('--final_fc_dim', type=int, default=32)
    parser.add_argument('--max_iter', type=int, default=10)
    parser.add_argument('--init_lr', type=float, default=0.01)
    parser.add_argument('--maxgradnorm', type=float, default=50.0)
    params = parser.parse_args()
    torch.set_num_threads(1)
    np.random.seed(params.seed)
    torch.manual_seed(params.seed)

    n_question, seqlen = 25, 30
    logs = simulate_students(800, n_question, 5, np.random.RandomState(params.seed))
    train_data = to_arrays(logs[:600], seqlen, n_question)
    test_data = to_arrays(logs[600:], seqlen, n_question)

    model = MODEL(n_question, params.q_embed_dim, params.qa_embed_dim, params.memory_size, params.final_fc_dim)
    optimizer = torch.optim.Adam(model.parameters(), lr=params.init_lr, betas=(0.9, 0.9))
    for idx in range(params.max_iter):
        lr = adjust_learning_rate(optimizer, idx, params.init_lr)
        train_loss, train_auc = train(model, params, optimizer, *train_data)
        valid_loss, valid_auc = test(model, *test_data)
        print('epoch %d/%d, lr %.4f, loss : %3.5f, auc : %3.5f | test loss : %3.5f, auc : %3.5f' % (
            idx + 1, params.max_iter, lr, train_loss, train_auc, valid_loss, valid_auc))
    print('metric %.5f' % valid_auc)


if __name__ == '__main__':
    main()
