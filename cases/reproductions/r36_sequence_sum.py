import argparse

import torch
from torch import nn, optim

parser = argparse.ArgumentParser()
parser.add_argument("--fixed", action="store_true")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)

# the target of a sequence is the sum of its values
seq_length, input_dim = 10, 1
X = torch.rand(1500, seq_length, input_dim)
y = X.sum(dim=1)
X_train, y_train, X_test, y_test = X[:1200], y[:1200], X[1200:], y[1200:]


class TransformerModel(nn.Module):
    def __init__(self, input_dim, embed_dim, num_heads, num_layers, ff_dim, output_dim):
        super().__init__()
        self.embedding = nn.Linear(input_dim, embed_dim)
        options = {"batch_first": True} if args.fixed else {}
        self.transformer_encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                d_model=embed_dim,
                nhead=num_heads,
                dim_feedforward=ff_dim,
                dropout=0.0,
                **options,
            ),
            num_layers=num_layers,
            enable_nested_tensor=False,
        )
        self.output_layer = nn.Linear(embed_dim, output_dim)

    def forward(self, x):
        embedded = self.embedding(x)
        transformer_output = self.transformer_encoder(embedded)
        return self.output_layer(transformer_output[:, -1, :])


model = TransformerModel(
    input_dim=input_dim, embed_dim=16, num_heads=2, num_layers=2, ff_dim=64, output_dim=1
)
criterion = nn.MSELoss()
optimizer = optim.Adam(model.parameters(), lr=3e-3)

epochs, batch_size = 18, 50
for epoch in range(epochs):
    model.train()
    order = torch.randperm(len(X_train))
    epoch_loss = 0.0
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        optimizer.zero_grad()
        predictions = model(X_train[index])
        loss = criterion(predictions, y_train[index])
        loss.backward()
        optimizer.step()
        epoch_loss += loss.item() * len(index)
    if (epoch + 1) % 3 == 0:
        print(f"Epoch [{epoch + 1}/{epochs}] - Loss: {epoch_loss / len(order):.4f}")

model.eval()
with torch.no_grad():
    predictions = torch.cat([model(part) for part in X_test.split(batch_size)])
    error = criterion(predictions, y_test)
    print(f"Test Loss: {error.item():.4f}")
    r2 = 1 - error / y_test.var(unbiased=False)
print(f"metric {r2.item():.4f}")
