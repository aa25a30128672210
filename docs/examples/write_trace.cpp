#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

// A safetensors file: 8 bytes with the length of the header, the header in JSON, the numbers.
// Integers and floats are little-endian, as they are in the memory of x86 and ARM.
class Trace {
    std::string header, data;

  public:
    void metadata(const std::string &texts) { header += "\"__metadata__\":{" + texts + "},"; }

    template <class T>
    void keep(const std::string &name, const std::string &dtype, const std::string &shape,
              const std::vector<T> &numbers) {
        const auto start = data.size();
        data.append(reinterpret_cast<const char *>(numbers.data()), numbers.size() * sizeof(T));
        header += "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape +
                  "],\"data_offsets\":[" + std::to_string(start) + "," +
                  std::to_string(data.size()) + "]},";
    }

    void save(const std::string &path) {
        header.back() = '}';  // in place of the last comma
        const std::string text = "{" + header + std::string((15 - header.size() % 8) % 8, ' ');
        const std::uint64_t length = text.size();
        std::ofstream file(path, std::ios::binary);
        file.write(reinterpret_cast<const char *>(&length), 8) << text << data;
    }
};

int main(int, char **arguments) {
    Trace trace;
    trace.metadata(R"("engine":"my port 1.0","dtype":"bfloat16","accumulate":"float32")");
    trace.keep("input_ids", "I32", "1,2", std::vector<std::int32_t>{504, 3575});
    trace.keep("model.layers.0.self_attn.q_rope", "F32", "1,2,1,4",
               std::vector<float>{0.5f, -1, 2, 0, 0.25f, 3, -4, 1});
    trace.save(arguments[1]);
}
