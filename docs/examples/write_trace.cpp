// write_trace MODEL.safetensors TRACE.safetensors
//
// Computes the embeddings and the first norm of SmolLM2. Each array is
// written as soon as it is computed.
#include <cmath>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

// A safetensors file is 8 bytes with the length of the header, the header in JSON, and the numbers.
// Integers and floats are little-endian, as they are in the memory of x86 and ARM. The header comes
// first but is known last: room is left for it, and what it does not fill becomes spaces.
class TraceWriter {
    static constexpr std::uint64_t room = 1 << 20;  // for some 8000 arrays; a multiple of 8
    std::ofstream file;
    std::string header;
    std::uint64_t written = 0;

  public:
    TraceWriter(const std::string &path, const std::string &metadata)
        : file(path, std::ios::binary), header("{\"__metadata__\":" + metadata) {
        file.exceptions(std::ios::failbit | std::ios::badbit);
        file.seekp(8 + room);
    }

    template <class T>
    void keep(const std::string &name, const std::string &dtype, const std::string &shape,
              const std::vector<T> &numbers) {
        const std::uint64_t start = written;
        written += numbers.size() * sizeof(T);
        file.write(reinterpret_cast<const char *>(numbers.data()), numbers.size() * sizeof(T));
        header += ",\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape +
                  "],\"data_offsets\":[" + std::to_string(start) + "," +
                  std::to_string(written) + "]}";
    }

    void close() {
        header += "}";
        if (header.size() > room) throw std::runtime_error("the header needs more room");
        header.resize(room, ' ');
        file.seekp(0);
        file.write(reinterpret_cast<const char *>(&room), 8) << header;
        file.close();
    }
};

// A float32 tensor of the model, found in its header by name.
std::vector<float> tensor(std::ifstream &model, const std::string &header,
                          const std::string &name) {
    const std::string offsets = "\"data_offsets\":[";
    const auto entry = header.find("\"" + name + "\":");
    const auto place = header.find(offsets, entry);
    if (entry == std::string::npos || place == std::string::npos) throw std::runtime_error(name);
    std::size_t length;
    const auto start = std::stoull(header.substr(place + offsets.size(), 20), &length);
    const auto end = std::stoull(header.substr(place + offsets.size() + length + 1, 20));
    std::vector<float> numbers((end - start) / sizeof(float));
    model.seekg(8 + header.size() + start);
    model.read(reinterpret_cast<char *>(numbers.data()), end - start);
    return numbers;
}

int main(int, char **arguments) {
    std::ifstream model(arguments[1], std::ios::binary);
    model.exceptions(std::ios::failbit | std::ios::badbit);
    std::uint64_t length;
    model.read(reinterpret_cast<char *>(&length), 8);
    std::string header(length, ' ');
    model.read(header.data(), length);

    TraceWriter trace(arguments[2], R"({"engine":"my port 1.0","dtype":"float32"})");
    const std::vector<std::int32_t> ids = {504, 3575, 282, 4649, 314};
    const std::string tokens = std::to_string(ids.size());
    trace.keep("input_ids", "I32", "1," + tokens, ids);

    const auto weight = tensor(model, header, "model.layers.0.input_layernorm.weight");
    const auto embeddings = tensor(model, header, "model.embed_tokens.weight");
    const auto width = weight.size();
    std::vector<float> x;
    for (const auto id : ids)
        x.insert(x.end(), &embeddings[id * width], &embeddings[id * width] + width);
    const std::string shape = "1," + tokens + "," + std::to_string(width);
    trace.keep("model.embed_tokens", "F32", shape, x);

    for (auto row = x.begin(); row != x.end(); row += width) {
        float sum = 0;
        for (std::size_t i = 0; i < width; i++) sum += row[i] * row[i];
        const float scale = 1 / std::sqrt(sum / width + 1e-5f);
        for (std::size_t i = 0; i < width; i++) row[i] = row[i] * scale * weight[i];
    }
    trace.keep("model.layers.0.input_layernorm", "F32", shape, x);
    trace.close();
}
