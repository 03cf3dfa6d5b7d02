// A text field, text area or choice that keeps what is written in it, however often the page around it is drawn anew.
// It says what stands there when the writer pauses, and at once when they leave it.
export default {
  template: `
    <textarea v-if="lines" :rows="lines" v-model="text" @input="later" @change="now" spellcheck="false"></textarea>
    <select v-else-if="options" v-model="text" @change="now">
      <option v-for="[value, label] in options" :key="value" :value="value">{{ label }}</option>
    </select>
    <input v-else-if="moment" type="datetime-local" step="1" v-model="text" @input="later" @change="now" />
    <input v-else type="text" v-model="text" @input="later" @change="now" spellcheck="false" />`,
  props: { initial: String, lines: Number, options: Array, moment: Boolean, wait: Number },
  emits: ["written"],
  data() {
    return { text: this.initial, said: this.initial, times: 0, timer: null };
  },
  methods: {
    later() {
      clearTimeout(this.timer);
      this.timer = setTimeout(this.now, this.wait);
    },
    now() {
      clearTimeout(this.timer);
      if (this.text === this.said) return;
      this.said = this.text;
      this.$emit("written", this.text, ++this.times);
    },
    // What is being written, or was written and is not heard of yet, is not written over.
    put(text, heard) {
      if (this.text !== this.said || heard !== this.times) return;
      this.text = this.said = text;
    },
  },
};
