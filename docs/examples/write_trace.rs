// write_trace MODEL.safetensors TRACE.safetensors
//
// Computes the embeddings and the first norm of SmolLM2. Each array is
// written as soon as it is computed.
use std::env;
use std::fs::File;
use std::io::{BufWriter, Error, Read, Result, Seek, SeekFrom, Write};

// A safetensors file is 8 bytes with the length of the header, the header in JSON, and the numbers,
// little-endian. The header comes first but is known last: room is left for it, and what it does not
// fill becomes spaces.
const ROOM: usize = 1 << 20; // for some 8000 arrays; a multiple of 8

struct TraceWriter {
    file: BufWriter<File>,
    header: String,
    written: usize,
}

impl TraceWriter {
    fn create(path: &str, metadata: &str) -> Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        file.seek(SeekFrom::Start(8 + ROOM as u64))?;
        let header = format!("{{\"__metadata__\":{metadata}");
        Ok(Self {
            file,
            header,
            written: 0,
        })
    }

    fn keep(
        &mut self,
        name: &str,
        dtype: &str,
        shape: &[usize],
        numbers: &[[u8; 4]],
    ) -> Result<()> {
        let start = self.written;
        self.written += 4 * numbers.len();
        let end = self.written;
        self.header += &format!(
            ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
        );
        self.file.write_all(numbers.as_flattened())
    }

    fn floats(&mut self, name: &str, shape: &[usize], numbers: &[f32]) -> Result<()> {
        let bytes: Vec<_> = numbers.iter().map(|x| x.to_le_bytes()).collect();
        self.keep(name, "F32", shape, &bytes)
    }

    fn close(mut self) -> Result<()> {
        self.header.push('}');
        let more = "the header needs more room";
        let spaces = ROOM
            .checked_sub(self.header.len())
            .ok_or_else(|| Error::other(more))?;
        self.header += &" ".repeat(spaces);
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&(ROOM as u64).to_le_bytes())?;
        self.file.write_all(self.header.as_bytes())?;
        self.file.flush()
    }
}

struct Model {
    file: File,
    header: String,
}

impl Model {
    fn open(path: &str) -> Result<Self> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let mut header = vec![0; u64::from_le_bytes(length) as usize];
        file.read_exact(&mut header)?;
        let header = String::from_utf8(header).map_err(Error::other)?;
        Ok(Self { file, header })
    }

    // A float32 tensor, found in the header by its name.
    fn tensor(&mut self, name: &str) -> Result<Vec<f32>> {
        let missing = || Error::other(format!("the model has no {name}"));
        let entry = self
            .header
            .split_once(&format!("\"{name}\":"))
            .ok_or_else(missing)?
            .1;
        let offsets = entry
            .split_once("\"data_offsets\":[")
            .ok_or_else(missing)?
            .1;
        let (offsets, _) = offsets.split_once(']').ok_or_else(missing)?;
        let (start, end) = offsets.split_once(',').ok_or_else(missing)?;
        let start: u64 = start.trim().parse().map_err(Error::other)?;
        let end: u64 = end.trim().parse().map_err(Error::other)?;
        let mut bytes = vec![0; (end - start) as usize];
        self.file
            .seek(SeekFrom::Start(8 + self.header.len() as u64 + start))?;
        self.file.read_exact(&mut bytes)?;
        let four = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(bytes.chunks_exact(4).map(four).collect())
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().collect();
    let mut model = Model::open(&arguments[1])?;
    let said = r#"{"engine":"my port 1.0","dtype":"float32"}"#;
    let mut trace = TraceWriter::create(&arguments[2], said)?;
    let ids: [i32; 5] = [504, 3575, 282, 4649, 314];
    trace.keep(
        "input_ids",
        "I32",
        &[1, ids.len()],
        &ids.map(|id| id.to_le_bytes()),
    )?;

    let weight = model.tensor("model.layers.0.input_layernorm.weight")?;
    let embeddings = model.tensor("model.embed_tokens.weight")?;
    let width = weight.len();
    let shape = [1, ids.len(), width];
    let mut x = Vec::new();
    for id in ids {
        x.extend_from_slice(&embeddings[id as usize * width..][..width]);
    }
    trace.floats("model.embed_tokens", &shape, &x)?;

    for row in x.chunks_exact_mut(width) {
        let sum: f32 = row.iter().map(|x| x * x).sum();
        let scale = 1.0 / (sum / width as f32 + 1e-5).sqrt();
        for (x, w) in row.iter_mut().zip(&weight) {
            *x *= scale * w;
        }
    }
    trace.floats("model.layers.0.input_layernorm", &shape, &x)?;
    trace.close()
}
