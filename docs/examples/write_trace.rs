// Cargo.toml: safetensors = "0.5"
use safetensors::tensor::{serialize_to_file, Dtype, SafeTensorError, TensorView};
use std::{collections::HashMap, env, path::Path};

#[derive(Default)]
struct Trace(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Trace {
    fn keep(&mut self, name: &str, shape: &[usize], numbers: &[f32]) {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.0.push((name.into(), Dtype::F32, shape.into(), bytes));
    }

    fn tokens(&mut self, ids: &[i32]) {
        let bytes = ids.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.0
            .push(("input_ids".into(), Dtype::I32, vec![1, ids.len()], bytes));
    }

    fn save(&self, path: &Path, metadata: HashMap<String, String>) -> Result<(), SafeTensorError> {
        let mut views = Vec::new();
        for (name, dtype, shape, bytes) in &self.0 {
            views.push((name, TensorView::new(*dtype, shape.clone(), bytes)?));
        }
        serialize_to_file(views, &Some(metadata), path)
    }
}

fn main() -> Result<(), SafeTensorError> {
    let mut trace = Trace::default();
    trace.tokens(&[504, 3575]);
    trace.keep(
        "model.layers.0.self_attn.q_rope",
        &[1, 2, 1, 4],
        &[0.5, -1.0, 2.0, 0.0, 0.25, 3.0, -4.0, 1.0],
    );
    let said = [
        ("engine", "my port 1.0"),
        ("dtype", "bfloat16"),
        ("accumulate", "float32"),
    ];
    let metadata = said
        .map(|(key, text)| (key.to_string(), text.to_string()))
        .into();
    trace.save(Path::new(&env::args().nth(1).expect("a path")), metadata)
}
