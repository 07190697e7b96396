"""The paper's study of three attention models, repeated with seeds, intervals and control arms."""
